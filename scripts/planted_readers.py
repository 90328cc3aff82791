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
    Bug(
        "readers: ids wrap at 65,536",
        "data/tokenizer.py",
        "return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))",
        "return len(tokenizer)",
        "test_data_odd_tokenizers",
    ),
    Bug(
        "readers: replacements multiply text without a limit",
        "data/tokenizer.py",
        "if part is not None and (grown := growth(json.loads(part.__getstate__()))) > LARGEST_GROWTH:",
        "if part is not None and (grown := growth(json.loads(part.__getstate__()))) > 2**40:",
        "test_data_odd_tokenizers",
    ),
]
