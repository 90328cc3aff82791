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
    Bug(
        "cache: what a living process builds is cleared away",
        "data/cache.py",
        "fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)",
        "fcntl.LOCK_SH | (0 if wait else fcntl.LOCK_NB)",
        "test_data_preparation::test_a_build_that_looks_old_is_left_alone",
    ),
    Bug(
        "cache: what is left of a build is sealed as whole",
        "data/cache.py",
        "if not (content / name).is_file()]",
        "if not content.is_dir()]",
        "test_data_preparation::test_a_build_that_lost_a_file_is_not_sealed",
    ),
    Bug(
        "cache: a killed build stays for ever",
        "data/cache.py",
        "            shutil.rmtree(place, ignore_errors=True)\n            os.close(lock)",
        "            os.close(lock)",
        "test_data_preparation::test_a_killed_build_leaves_nothing_that_counts",
    ),
    Bug(
        "cache: damage is not noticed",
        "data/cache.py",
        'return status.st_mtime_ns == sealed["changed"] or _checksum(path) == sealed["sha256"]',
        "return True",
        "test_data_preparation::test_a_damaged_cache_is_built_again",
    ),
    Bug(
        "cache: a changed file of the same size is taken for unchanged",
        "data/inventory.py",
        "status.st_size, status.st_mtime_ns, status.st_ctime_ns)",
        "status.st_size)",
        "test_data_building",
    ),
    Bug(
        "cache: half a batch stays in a stream that goes on",
        "data/packing.py",
        "self._file.truncate(self._file.tell() + length * self._dtype.itemsize)",
        "self._file.truncate()",
        "test_data_building",
    ),
    Bug(
        "corpus: everything is read into memory before it is sampled",
        "data/spool.py",
        "for document in () if spool.complete else documents:",
        "for document in () if spool.complete else list(documents):",
        "test_data_building::test_memory_of_reading_does_not_grow_with_the_text",
    ),
]
