"""temporary bridge"""

import json
from pathlib import Path
from typing import Any
from moestro.comparison import _decoded, _encoded
from moestro.training.checkpoints import write_atomically


def write_record(record: Any, path: Path) -> None:
    write_atomically(path, json.dumps(_encoded(record, path.stem), indent=1, allow_nan=False) + "\n")


def read_record(kind: Any, path: Path) -> Any:
    return _decoded(kind, json.loads(path.read_text()), path.stem)
