"""Bugs of the gate: what comes from outside would pass unchecked."""

from planted_bug import Bug

BUGS = [
    Bug(
        "gate: a tokenizer's own code is offered",
        "gate/loading.py",
        "return AutoTokenizer.from_pretrained(place, trust_remote_code=False)",
        "return AutoTokenizer.from_pretrained(place)",
        "test_gate_loading::test_a_tokenizers_own_code_is_not_offered",
    ),
    Bug(
        "gate: pickled adapters are read",
        "gate/loading.py",
        "if not (Path(folder) / ADAPTER_WEIGHTS).is_file():",
        "if False:",
        "test_gate_loading::test_an_adapters_pickle_is_never_read",
    ),
    Bug(
        "gate: shards outside the folder are read",
        "gate/loading.py",
        'if path.is_absolute() or ".." in path.parts',
        "if False",
        "test_gate_loading::test_a_strangers_files_run_no_code_and_end_in_one_line",
    ),
]
