"""Bugs of the readers of files and tokenizers that a test must catch."""

from planted_bug import Bug

BUGS = [
    Bug(
        "readers: no limit on expansion",
        "data/compression.py",
        "if self.total > self.limit:",
        "if False:",
        "test_data_hostile",
    ),
    Bug(
        "readers: lines without a cost",
        "data/json_rows.py",
        "expansion.add(ROW_COST + len(line))",
        "expansion.add(len(line))",
        "test_data_hostile",
    ),
    Bug(
        "readers: Parquet's shared values are copied to every row",
        "data/tables.py",
        "read_dictionary=text",
        "read_dictionary=[]",
        "test_data_hostile",
    ),
]
