"""Bugs of the gate: what comes from outside would pass unchecked."""

from planted_bug import Bug

BUGS = [
    Bug(
        "gate: torch is imported before the words are checked",
        "architecture/model.py",
        "from dataclasses import dataclass\n",
        "from dataclasses import dataclass\n\nimport torch\n",
        "test_startup::test_help_imports_nothing_heavy",
    ),
    Bug(
        "gate: a recipe's losses on competition are not checked from its words",
        "training/recipe.py",
        "distillation=self.losses.distillation, diversity=self.losses.diversity)",
        "distillation=0.0, diversity=0.0)",
        "test_startup::test_a_misuse_that_the_words_show_imports_nothing_heavy",
    ),
    Bug(
        "gate: sub-layers that cannot be tied are",
        "architecture/model.py",
        "check_composition(block, self.composition, index)",
        "pass",
        "test_configuration",
    ),
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
    Bug(
        "gate: as many layers as anybody types",
        "gate/ranges.py",
        "Layers = Annotated[int, Range(at_least=1, at_most=2_000)]",
        "Layers = Annotated[int, Range(at_least=1, at_most=10**6)]",
        "test_gate_ranges::test_absurd_recipes_are_known_from_their_words_alone",
    ),
    Bug(
        "gate: as many parameters as anybody types",
        "training/recipe.py",
        ".total) > MOST_PARAMETERS:",
        ".total) > 10**30:",
        "test_gate_ranges::test_absurd_recipes_are_known_from_their_words_alone",
    ),
    Bug(
        "gate: NaN passes for a number",
        "gate/ranges.py",
        " or not finite(value):",
        ":",
        "test_gate_ranges::test_no_number_is_nan_infinite_negative_or_something_else",
    ),
    Bug(
        "gate: escape sequences reach the terminal",
        "cli.py",
        "{one_line(told(error))}",
        "{told(error)}",
        "test_gate_command_line::test_misuse_is_one_visible_line_before_any_work",
    ),
    Bug(
        "gate: experts that do not exist are chosen",
        "adapters/reroute.py",
        "absent = used & ((expert < 0) | (expert >= layer.num_experts))",
        "absent = used & (expert < 0)",
        "test_gate_choices::test_a_choice_that_cannot_run_is_refused_by_name",
    ),
    Bug(
        "gate: layers without responses pass in silence",
        "adapters/compete.py",
        "        self.check_counts()\n",
        "",
        "test_gate_choices",
    ),
]
