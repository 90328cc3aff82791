"""What perturbed routing does to the loss: rows, sentences and the figure of it."""

from collections.abc import Sequence
from typing import Any

from moestro.gate.visible import shortened
from moestro.inspection.measuring import Measured, RoutingStudy
from moestro.inspection.robustness import Robustness, RobustnessTest
from moestro.report.curves import Figure, frame, series_colour
from moestro.report.numbers import ABSENT, fixed, signed
from moestro.report.routing_summary import Row
from moestro.report.text import plotly_label

Key = tuple[str, float, str]

METHOD = (
    "Disabled is each token's routed expert of largest weight, at evaluation and without retraining: the router's own "
    "rule then chooses among the others, and the weights are what it makes of them. A random expert, of those that the "
    "token did not choose, keeps the weight of the one in whose place it stands. Noise is Gaussian, in units of the "
    "standard deviation of each token's logits. Every line says in which layers; all others are undisturbed."
)
_NAMES = {"disabled": "disabled", "replaced": "random", "noise": "noise"}
_TICKS, _LONGEST_NAME = 16, 40


def tested(study: RoutingStudy) -> bool:
    """Whether any checkpoint was perturbed."""
    return any(checkpoint.robustness for checkpoint in study.checkpoints)


def tests_of(checkpoint: Measured) -> dict[Key, RobustnessTest]:
    """The tests of a checkpoint by what was done and where."""
    tests = checkpoint.robustness.tests if checkpoint.robustness else ()
    return {(test.kind, test.amount, test.scope.label): test for test in tests}


def keys(study: RoutingStudy) -> list[Key]:
    """All tests of all checkpoints: single layers in the order of blocks, then wider scopes, then other kinds."""
    found = dict.fromkeys(key for checkpoint in study.checkpoints for key in tests_of(checkpoint))
    return sorted(found, key=place)


def place(key: Key) -> tuple[Any, ...]:
    """Where a test stands among all."""
    kind, amount, label = key
    numbers = [int(part) for part in label.split(".")] if is_layer(label) else []
    return list(_NAMES).index(kind), amount, not numbers, label == "all", numbers


def is_layer(label: str) -> bool:
    """Whether the scope is a single layer."""
    return label[0].isdigit() and label.replace(".", "").isdigit()


def words(test: RobustnessTest) -> str:
    """What was done: "top-1 disabled"."""
    if test.kind == "noise":
        return f"noise of {test.amount:g} on the logits"
    return f"top-{test.amount:g} {'disabled' if test.kind == 'disabled' else 'replaced at random'}"


def robustness_rows(study: RoutingStudy) -> tuple[Row, ...]:
    """The undisturbed loss, and per test the rise of the loss and the perplexity."""
    undisturbed = [f"{fixed(r.loss)} ({fixed(r.perplexity, 2)})" if r else ABSENT for r in robust(study)]
    rows = [Row(name="undisturbed", detail="loss, in nats per token", cells=tuple(undisturbed))]
    for key in keys(study):
        tests = [tests_of(checkpoint).get(key) for checkpoint in study.checkpoints]
        some = next(test for test in tests if test)
        rows.append(
            Row(
                name=words(some),
                detail=" / ".join(dict.fromkeys(test.scope.words for test in tests if test)),
                cells=tuple(cell(test) for test in tests),
                difference=difference(tests, comparable=study.same_tokens),
            )
        )
    return tuple(rows)


def robust(study: RoutingStudy) -> list[Robustness | None]:
    """Of each checkpoint."""
    return [checkpoint.robustness for checkpoint in study.checkpoints]


def cell(test: RobustnessTest | None) -> str:
    """Rise and perplexity."""
    if test is None or test.rise is None:
        return ABSENT
    return f"{signed(test.rise)} ({fixed(test.perplexity, 2)})"


def difference(tests: Sequence[RobustnessTest | None], *, comparable: bool) -> str:
    """The second rise minus the first."""
    rises = [test.rise for test in tests if test and test.rise is not None]
    return signed(rises[1] - rises[0]) if len(rises) == 2 and comparable else ABSENT


def findings(checkpoint: Measured) -> list[str]:
    """What the tests say of a checkpoint, in sentences; none where it was not tested."""
    if checkpoint.robustness is None:
        return []
    disabled = [t for t in checkpoint.robustness.tests if t.kind == "disabled" and t.amount == 1 and t.rise is not None]
    single = [(t.rise or 0.0, t.scope.label) for t in disabled if is_layer(t.scope.label)]
    said = [
        f"With each token's first expert disabled in {t.scope.words} the loss changes by {signed(t.rise or 0.0)} nats "
        f"per token, perplexity from {fixed(checkpoint.robustness.perplexity, 2)} to {fixed(t.perplexity, 2)}."
        for t in disabled
        if t.scope.label == "all"
    ]
    if single:
        (most, where), (least, other) = max(single), min(single)
        rises = f"One layer at a time it rises most in layer {where} ({signed(most)})"
        said.append(f"{rises} and least in layer {other} ({signed(least)})." if len(single) > 1 else f"{rises}.")
    return said + limits(checkpoint.robustness)


def limits(found: Robustness) -> list[str]:
    """What could not be tested, and why."""
    said = []
    if found.looked_up:
        said.append(f"Experts are looked up by token in {found.looked_up}: only random replacement reaches there.")
    failed: dict[str, list[RobustnessTest]] = {}
    for test in found.tests:
        if test.obstacle:
            failed.setdefault(words(test), []).append(test)
    for what, tests in failed.items():
        where = ", ".join(test.scope.words for test in tests)
        said.append(f"Not tested: {what} ({where}): {tests[0].obstacle}.")
    return said


def robustness_figure(study: RoutingStudy) -> Figure | None:
    """Perplexity under each test on a logarithmic scale, and a dotted line where it is undisturbed."""
    if not tested(study):
        return None
    columns = keys(study)
    singles = sum(is_layer(label) for _, _, label in columns)
    stride = -(-singles // _TICKS) if singles else 1
    shown = [i for i, key in enumerate(columns) if not is_layer(key[2]) or i % stride == 0]
    layout = frame(height=320)
    layout["xaxis"] |= {"tickvals": shown, "ticktext": [tick(columns[i]) for i in shown], "showgrid": False}
    layout["xaxis"] |= {"range": [-0.6, len(columns) - 0.4]}
    layout["yaxis"] |= {"type": "log", "showline": False, "nticks": 8, "title": {"text": "perplexity", "standoff": 6}}
    layout["hovermode"] = "x unified"
    traces = [t for index, c in enumerate(study.checkpoints) if c.robustness for t in drawn(c, index, columns)]
    return {"data": traces, "layout": layout}


def tick(key: Key) -> str:
    """A test's name on the axis: the layer's label, or what was done where in few words."""
    kind, amount, label = key
    if kind == "disabled":
        return label if amount == 1 else f"{label}, top-{amount:g}"
    return f"noise {amount:g}" if kind == "noise" else f"random {amount:g}"


def drawn(checkpoint: Measured, index: int, columns: Sequence[Key]) -> list[Figure]:
    """One checkpoint's perplexities: points, joined where they are of single layers; and the undisturbed one."""
    tests, colour = tests_of(checkpoint), series_colour(index + 1)
    name = plotly_label(shortened(checkpoint.finding.name, _LONGEST_NAME))
    points = [(x, key, tests[key]) for x, key in enumerate(columns) if key in tests and tests[key].perplexity]
    base: Figure = {"type": "scatter", "name": name, "line": {"color": colour, "width": 2}}
    marker = {"size": 7, "symbol": ("circle", "square")[index % 2], "color": colour}
    traces = []
    for joined in (True, False):
        own = [(x, key, test) for x, key, test in points if is_layer(key[2]) == joined]
        text = [plotly_label(f"{words(test)}, {test.scope.words}") for _, _, test in own]
        traces.append(
            base
            | {"mode": "lines+markers" if joined else "markers", "marker": marker, "text": text}
            | {"x": [x for x, _, _ in own], "y": [float(f"{test.perplexity:.6g}") for _, _, test in own]}
            | {"hovertemplate": "%{y:.2f}, %{text}<extra>%{fullData.name}</extra>"}
        )
    undisturbed = checkpoint.robustness.perplexity if checkpoint.robustness else None
    if undisturbed is not None:
        level = {"x": [-0.6, len(columns) - 0.4], "y": [float(f"{undisturbed:.6g}")] * 2, "hoverinfo": "skip"}
        line = {"color": colour, "width": 1.2, "dash": "dot"}
        traces.append(base | level | {"mode": "lines", "line": line, "opacity": 0.75})
    return traces
