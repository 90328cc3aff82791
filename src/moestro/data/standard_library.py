"""The default corpus: the Python standard library of the interpreter that runs us. No download, four domains."""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moestro.data.files import NotText, read_text
from moestro.data.sources import Document

DOMAINS = ("library", "tests", "documentation", "headers")
NAME = f"standard library of {sys.implementation.name} {sys.version.split()[0]}"

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def read_standard_library() -> tuple[list[Document], tuple[str, ...]]:
    """All documents in a fixed order, and the domains that this interpreter was installed without.

    `library`: its Python code; `tests`: the code of its tests; `documentation`: the language reference as `help()`
    shows it, one document a topic; `headers`: the C headers of the interpreter.
    """
    documents = [*_read_code(), *_read_documentation(), *_read_headers()]
    present = {document.domain for document in documents}
    return documents, tuple(domain for domain in DOMAINS if domain not in present)


def files() -> Iterator[Path]:
    """Yield every file that documents are read from."""
    for name, ending in (("stdlib", ".py"), ("include", ".h")):
        root = Path(sysconfig.get_path(name))
        yield from (root / path for path in _files_below(root, ending))
    topics = importlib.util.find_spec("pydoc_data.topics") if importlib.util.find_spec("pydoc_data") else None
    if topics is not None and topics.origin is not None:
        yield Path(topics.origin)


def _read_code() -> Iterator[Document]:
    for path in _files_below(Path(sysconfig.get_path("stdlib")), ".py"):
        if path.name.startswith("_sysconfigdata"):  # how this interpreter was compiled, not library code
            continue
        domain = "tests" if _TEST_FOLDERS.intersection(path.parts) else "library"
        yield from _read_file(Path(sysconfig.get_path("stdlib")), path, domain)


def _read_documentation() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # split off into another package by some distributions
        return
    for topic in sorted(topics):
        yield Document(text=topics[topic], domain="documentation", source=f"pydoc_data.topics:{topic}")


def _read_headers() -> Iterator[Document]:
    include = Path(sysconfig.get_path("include"))
    for path in _files_below(include, ".h"):
        yield from _read_file(include, path, "headers")


def _files_below(root: Path, ending: str) -> Iterator[Path]:
    """Paths relative to `root`, in sorted order; nothing where there is no such folder."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        yield from (Path(parent, name).relative_to(root) for name in sorted(files) if name.endswith(ending))


def _read_file(root: Path, path: Path, domain: str) -> Iterator[Document]:
    try:
        text = read_text(root / path)
    except NotText:  # the tests hold some files of broken encoding, on purpose
        return
    if text.strip():
        yield Document(text=text, domain=domain, source=f"{path.as_posix()}:1")
