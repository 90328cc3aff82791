"""Citations in the code and docs/papers.md agree, both ways."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def cited_in_code() -> dict[str, set[str]]:
    files = sorted((ROOT / "src" / "moestro").rglob("*.py"))
    return {str(path.relative_to(ROOT / "src" / "moestro")): set(ARXIV.findall(path.read_text())) for path in files}


def rows_of_the_table() -> dict[str, set[str]]:
    rows = {}
    for line in (ROOT / "docs" / "papers.md").read_text().splitlines():
        if line.startswith("|") and (found := ARXIV.search(line)):
            rows[found.group(1)] = set(re.findall(r"`([\w/]+\.py)`", line.rsplit("|", 2)[1]))
    return rows


def test_every_citation_is_in_the_table_with_its_file_and_back():
    table = rows_of_the_table()
    from_code: dict[str, set[str]] = {}
    for path, papers in cited_in_code().items():
        for paper in papers:
            from_code.setdefault(paper, set()).add(path)
    assert from_code == table
