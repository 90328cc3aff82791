"""Hostile words: command lines, recipes, environments and arguments of the API."""

import dataclasses
import random
from pathlib import Path
from typing import Any

from hostile_run import Case

SMALL = ["--vocab-size", "300", "--sequence-length", "32", "--batch-tokens", "128", "--tokens", "1280"]
SMALL += ["--dtype", "float32", "--set", "hidden_size=16", "num_layers=2", "num_heads=2", "width=8"]
NUMBERS = ["1e400", "-0", "0x10", "١", "nan", "inf", "-inf", "-1", "1e30", "9" * 400, "9" * 5000, "1_000", " 3 ", "½"]
NUMBERS += ["0", "0.0", "1e-400", "1e308", "2147483648", "4294967296", "18446744073709551616", "1", "3", "0.5", "1/2"]
WORDS = [
    "",
    " ",
    "-",
    "--",
    "none",
    "None",
    "true",
    "[1]",
    "{}",
    "1,2",
    "=",
    ":",
    "::",
    "+",
    "a=b",
    "a=b::c",
    "%s",
    "{0}",
]
WORDS += [
    "a" * 300,
    "a" * 50_000,
    "\x1b[31mred\x1b[0m",
    "\u202eevil",
    "a\nb",
    "\t",
    "\r",
    "\x7f",
    "\x9b2J",
    "\udcff",
    "é" * 200,
]
WORDS += [
    "[red]x[/red]",
    "[/]",
    "<b>",
    "$(touch ran)",
    "`touch ran`",
    "; touch ran",
    "__import__('os')",
    "smoe",
    "tiny",
    "日本",
]
PATHS = [
    "/dev/null",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/etc/shadow",
    "~",
    "~nouser/x",
    ".",
    "..",
    "/",
    "",
    "*",
]
PATHS += [
    "**",
    "[",
    "?",
    "../../etc/passwd",
    "x/" * 3000,
    "hf:",
    "hf:nobody/x",
    "hf:::",
    "hf:a:b:c:d",
    "LABEL=",
    "=x",
    "x::",
]
PATHS += [
    "x::a+b",
    "http://localhost:1/x",
    "file:///etc/passwd",
    "a" * 5000,
    "[" * 500,
    "/proc/self/fd/0",
    "/nowhere/at/all",
]
HEADS = [
    "smoe",
    "dense",
    "cartesian",
    "fine-grained",
    "deepseek-v3",
    "smoe+compete",
    "smoe+specialise",
    "cartesian+tied",
]
FLAGS = ["--size", "--tokens", "--batch-tokens", "--micro-batch-tokens", "--sequence-length", "--vocab-size"]
FLAGS += ["--learning-rate", "--dtype", "--compile", "--checkpointing", "--set", "--seed", "--seeds", "--first-seed"]
FLAGS += [
    "--match",
    "--margin",
    "--sweep",
    "--sweep-tokens",
    "--screening-seed",
    "--data",
    "--text-column",
    "--tokenizer",
]
FLAGS += [
    "--max-bytes",
    "--max-held-out-bytes",
    "--out",
    "--report-to",
    "--robustness",
    "--nothing",
    "-x",
    "--allow-unequal",
]
FIELDS = ["top_k", "num_experts", "width", "num_layers", "hidden_size", "num_heads", "every", "dense_width", "balance"]
FIELDS += ["scale", "num_groups", "top_groups", "num_shared", "mix", "composition", "learning_rate", "warmup", "beta1"]
FIELDS += [
    "weight_decay",
    "max_grad_norm",
    "final_learning_rate",
    "rate",
    "start",
    "end",
    "temperature",
    "variance_cap",
]
FIELDS += [
    "orthogonality_form",
    "scores",
    "model.block",
    "block",
    "compete",
    "training",
    "name",
    "",
    ".",
    "model.",
    "a.b.c",
]
OBJECTS = [None, True, -1, 0, 1, 2, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**30, 10**5000, "", "a", "1", b"1"]
OBJECTS += [[], [1], (), {}, {"a": 1}, {1}, object(), object, len, 1j, "x" * 10**5, "cosine", "tokens", "\x1b[31m", ...]


def word(draw: random.Random) -> str:
    """Any word."""
    return draw.choice(draw.choice([NUMBERS, WORDS, PATHS]))


def command(draw: random.Random, folder: Path) -> Case:
    """A command with flags and values that may not fit."""
    argv = [draw.choice(["train", "compare", "inspect", "recipes", "recipes", word(draw)])]
    fits = draw.random() < 0.5  # all but the values of flags
    argv = [draw.choice(["train", "compare", "recipes"])] if fits else argv
    heads = {"train": 1, "recipes": 0}.get(argv[0], draw.randrange(3))
    argv += [draw.choice(HEADS) if fits else draw.choice([draw.choice(HEADS), word(draw)]) for _ in range(heads)]
    for _ in range(draw.randrange(1, 4)):
        argv.append(draw.choice(FLAGS))
        argv += [word(draw) for _ in range(1 if fits else draw.choice([0, 1, 1, 1, 2]))]
    return Case(argv=[*argv, *draw.choice([[], ["--dry-run"], ["--data", "nowhere"]])])


def spec(draw: random.Random, folder: Path) -> Case:
    """A recipe with fields and variants that may not fit."""
    fields = []
    for _ in range(draw.randrange(4)):
        value = draw.choice([word(draw), draw.choice(["1", "2", "4", "8", "0.5", "none", "true"])])
        fields.append(f"{draw.choice(FIELDS)}{draw.choice(['=', '=', '=', '=', '=', '=', '', '==', ':'])}{value}")
    text = draw.choice([*HEADS, *HEADS, word(draw)])
    text += draw.choice(["", "", "", "+", "++compete", "+tied+tied", "+" + word(draw)])
    text += draw.choice([":", ":", ":", "", "::"]) + draw.choice([",", ",", ",,", ";"]).join(fields)
    return Case(argv=[draw.choice(["train", "compare"]), text, "--dry-run"])


def environment(draw: random.Random, folder: Path) -> Case:
    """A good command in a bad environment."""
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(
            " ".join(draw.choices(["expert", "router", "token", "gate"], k=80))
        )
    names = ["MOESTRO_CACHE", "HOME", "HF_HOME", "COLUMNS", "TERM", "LC_ALL", "XDG_CACHE_HOME", "RANK", "TMPDIR"]
    bad = [
        str(folder / "file"),
        str(folder / "loop"),
        "/nowhere/at/all",
        "",
        "a" * 5000,
        "~nouser/x",
        "/dev/null",
        "-1",
        "x",
        "0",
    ]
    env = {draw.choice(names): draw.choice(bad) for _ in range(draw.randrange(1, 3))}
    out = draw.choice(
        [str(folder / "file"), str(folder / "loop"), str(folder / "out"), "/proc/x", "a" * 300, "x/" * 3000]
    )
    return Case(argv=["train", "smoe", "--data", str(folder / "texts"), "--out", out, *SMALL], env=env)


def arguments(draw: random.Random, folder: Path) -> Case:
    """A call of the API with objects that may not fit."""
    import moestro
    from moestro.inspection.running import Running
    from moestro.perturbations import add_noise
    from moestro.sweep import Grid
    from moestro.training.recipe import Losses, Training
    from moestro.training.recipes import recipe

    kinds: dict[Any, dict[str, Any]] = {
        moestro.AuxLosses: {},
        moestro.Compete: {},
        moestro.RouterRule: {},
        moestro.Dense: {"width": 8},
        moestro.MoE: {"num_experts": 4, "top_k": 2, "width": 8},
        moestro.MoestroConfig: {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        Training: {"tokens": 4096},
        Losses: {},
        Grid: {"learning_rates": (1e-3,)},
        Running: {},
    }
    if draw.random() < 0.1:
        what, name = draw.choice([(add_noise, "scale"), (recipe, "top_k")]), "call"
        value = draw.choice(OBJECTS)
        given = {"spec": "smoe"} if what[0] is recipe else {}
        return Case(
            call=lambda: what[0](**given, **{what[1]: value}), words=f"{what[0].__name__}({name}={shown(value)})"
        )
    kind = draw.choice(list(kinds))
    names = [field.name for field in dataclasses.fields(kind) if field.init and not field.name.startswith("_")]
    own = set(vars(kind).get("__annotations__", {}))
    names = [name for name in names if name in own]
    changed = {draw.choice(names): draw.choice(OBJECTS) for _ in range(draw.choice([1, 1, 2]))}
    words = f"{kind.__name__}({', '.join(f'{name}={shown(value)}' for name, value in changed.items())})"
    return Case(call=lambda: kind(**kinds[kind] | changed), words=words)


def shown(value: Any) -> str:
    """An object in few words."""
    return "10**5000" if isinstance(value, int) and value > 10**100 else repr(value)[:40]
