"""Bugs of the corpus: text on both sides of the split, and caches that are not what they seem."""

from planted_bug import Bug

BUGS = [
    Bug(
        "corpus: nothing is cut from held-out text",
        "data/split.py",
        "if attempt == _UNCUT}",
        "if attempt <= _UNCUT}",
        "test_data_overlap",
    ),
    Bug(
        "corpus: windows at the end of a block are missed",
        "data/overlap.py",
        "block = codes[start : start + _BLOCK + self.length - 1]",
        "block = codes[start : start + _BLOCK]",
        "test_data_overlap",
    ),
    Bug(
        "corpus: a window counts only its first character",
        "data/overlap.py",
        "np.add.at(steps, hits + self.length, -1)",
        "np.add.at(steps, hits + 1, -1)",
        "test_data_overlap",
    ),
    Bug(
        "corpus: near-duplicates are held out",
        "data/decontamination.py",
        "len(alike) and alike.mean() <= _ALIKE",
        "len(alike)",
        "test_data_overlap",
    ),
    Bug(
        "corpus: of equal windows the first one read decides the side",
        "data/spool.py",
        "ON CONFLICT DO UPDATE SET key = min(key, excluded.key)",
        "ON CONFLICT DO NOTHING",
        "test_data_overlap",
    ),
]
