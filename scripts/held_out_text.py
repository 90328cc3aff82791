"""Write the held-out text of a comparison, one file per domain: what `moestro inspect --data` shall look at.

python scripts/held_out_text.py OUT --data law=law.jsonl.gz fiction=novels/ --max-held-out-bytes 131072
moestro inspect runs/NAME/seed-0/model --robustness --data law=OUT/law.jsonl fiction=OUT/fiction.jsonl
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from one_line import one_line

from moestro.data.corpus import MAX_HELD_OUT_BYTES, load_corpus


def main(
    out: Annotated[Path, tyro.conf.Positional], data: Sequence[str], max_held_out_bytes: int = MAX_HELD_OUT_BYTES
) -> None:
    """Split as `moestro compare` does, with the same sources and limit, and write the documents held out."""
    corpus = load_corpus(data, max_held_out_bytes=max_held_out_bytes)
    out.mkdir(parents=True, exist_ok=True)
    for domain in corpus.domains:
        lines = [json.dumps({"text": document.text}) for document in corpus.held_out if document.domain == domain]
        (out / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line():
        tyro.cli(main, description=__doc__)
