"""A made-up comparison with the shape of a real one: three recipes, six domains, four MoE layers of sixteen experts."""

from dataclasses import replace
from functools import cache

import numpy as np

from moestro.comparison import (
    Budget,
    Comparison,
    CompetedLoss,
    CurvePoint,
    Data,
    DomainLoss,
    FailedRun,
    HeldOut,
    LayerStatistics,
    RecipeResult,
    Run,
    Screened,
    Sweep,
)
from moestro.statistics import compare_with_first, document_bootstrap

DOMAINS = {"code": -0.9, "fiction": 0.45, "law": -0.2, "math": 0.1, "tech docs": -0.05, "wiki": 0.5}
OFFSETS = {"dense": 0.0, "smoe": -0.0035, "fine-grained": -0.031}
STEPS = 640
BATCH_TOKENS = 2048
LAYERS = 4
EXPERTS = 16

# What people put into names and files, by malice or by accident.
HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=2>',
    "<b>bold</b> &lt;i&gt; <a href='javascript:window.pwned=3'>link</a> %{x} $x$",
    "</script><script>window.pwned=4</script>",
    "\x1b[31mred\x1b[0m\x07\r\n[bold]markup[/bold]",
    "\u202eevil\u202c {{ 7 * 7 }} [link=http://example.org]x[/link]",
)


@cache
def make_comparison(seeds: tuple[int, ...] = (0, 1, 2)) -> Comparison:
    runs = {name: tuple(_run(name, seed) for seed in seeds) for name in OFFSETS}
    differences = (None, *compare_with_first([[r.held_out.loss for r in runs[name]] for name in OFFSETS]))
    recipes = tuple(
        RecipeResult(
            name=name,
            description={
                "dense": "no experts",
                "smoe": "top-2 of 16 + 1 shared",
                "fine-grained": "top-4 of 16, shared experts summed",
            }[name],
            total_parameters={"dense": 3_285_120, "smoe": 8_004_864, "fine-grained": 8_003_072}[name],
            active_parameters={"dense": 3_285_120, "smoe": 3_286_272, "fine-grained": 3_284_480}[name],
            flops_per_token={"dense": 2.05e7, "smoe": 2.08e7, "fine-grained": 2.09e7}[name],
            runs=runs[name],
            difference=difference,
            document_bootstrap=None if difference is None else _bootstrap(difference.mean),
        )
        for name, difference in zip(OFFSETS, differences, strict=True)
    )
    return Comparison(
        version="0.1.0",
        created="2026-07-01T12:34:56+00:00",
        command="moestro compare dense smoe fine-grained --seeds 3 --size tiny",
        budget=_budget(),
        data=_data(),
        gzip_bits_per_byte=2.584,
        gzip_domains={domain: 2.584 + shift / 2 for domain, shift in DOMAINS.items()},
        environment={
            "moestro": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "machine": "x86_64, 2 cores, 23 GiB",
            "dtype": "float32",
        },
        seeds=seeds,
        recipes=recipes,
    )


def swept(comparison: Comparison, seed: int = 1000) -> Comparison:
    """The same after a sweep: the first recipe is best at the lowest rate, the last one failed at the highest."""
    losses = {
        "dense": (4.131, 4.142, 4.171, 4.65),
        "smoe": (4.152, 4.119, 4.139, 5.2),
        "fine-grained": (4.14, 4.096, 4.088, None),
    }
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    screened = {
        name: tuple(Screened(learning_rate=rate, loss=loss) for rate, loss in zip(rates, of, strict=True))
        for name, of in losses.items()
    }
    chosen = {"dense": 1e-3, "smoe": 2e-3, "fine-grained": 4e-3}
    tokens = dict.fromkeys(chosen, STEPS * BATCH_TOKENS // 2)
    return replace(comparison, sweep=Sweep(seed=seed, tokens=tokens, screened=screened, chosen=chosen))


def competing(comparison: Comparison) -> Comparison:
    """The same where experts compete in the last recipe; what its routers know of it rises while it trains."""

    def layer(value: LayerStatistics, known: float) -> LayerStatistics:
        figures = {
            "agreement": known,
            "agreement_shuffled": 0.2,
            "regret": 0.3 * (1 - known),
            "target_entropy": 0.93,
            "response": 1.5,
            "winners_max_vio": 0.8,
            "cosine": 0.2,
            "overlap": 0.5,
            "overlap_shuffled": 0.9,
        }
        return replace(value, figures=value.figures | figures)

    def run(value: Run, known: float) -> Run:
        curve = tuple(
            p
            if p.held_out_loss is None
            else replace(p, competition={"agreement": known * p.step / STEPS, "regret": 0.3 * (1 - known)})
            for p in value.curve
        )
        layers = tuple(layer(one, known + 0.01 * value.seed) for one in value.layers)
        competed = CompetedLoss(tokens=8192, router=4.1, competition=4.1 + 0.2 * (1 - known)) if layers else None
        return replace(value, curve=curve if layers else value.curve, layers=layers, competed=competed)

    recipes = tuple(
        replace(recipe, competes=index == 2, runs=tuple(run(each, (0.3, 0.3, 0.7)[index]) for each in recipe.runs))
        for index, recipe in enumerate(comparison.recipes)
    )
    return replace(comparison, recipes=recipes)


def hostile(comparison: Comparison) -> Comparison:
    """The same figures under names that try to break out."""
    renamed = dict(zip(DOMAINS, HOSTILE, strict=True))

    def run(value: Run) -> Run:
        layers = tuple(
            replace(layer, name=HOSTILE[0], domain_load={renamed[d]: v for d, v in layer.domain_load.items()})
            for layer in value.layers
        )
        domains = {renamed[d]: loss for d, loss in value.held_out.domains.items()}
        return replace(value, held_out=replace(value.held_out, domains=domains), layers=layers)

    def by_new_name(values: dict) -> dict:
        return {HOSTILE[i]: values[recipe.name] for i, recipe in enumerate(comparison.recipes)}

    sweep = comparison.sweep
    if sweep is not None:
        sweep = Sweep(
            seed=sweep.seed,
            tokens=by_new_name(sweep.tokens),
            screened=by_new_name(sweep.screened),
            chosen=by_new_name(sweep.chosen),
        )
    recipes = tuple(
        replace(r, name=HOSTILE[i], description=HOSTILE[i + 3], runs=tuple(map(run, r.runs)))
        for i, r in enumerate(comparison.recipes)
    )
    return replace(
        comparison,
        recipes=recipes,
        sweep=sweep,
        command="moestro compare --data '" + "".join(HOSTILE) + "'",
        version=HOSTILE[1],
        created=HOSTILE[0],
        environment={HOSTILE[0]: HOSTILE[1], HOSTILE[4]: HOSTILE[5]},
        gzip_domains={renamed[domain]: value for domain, value in comparison.gzip_domains.items()},
        data=replace(comparison.data, sources=HOSTILE, hash=HOSTILE[3], tokenizer=HOSTILE[0], notes=HOSTILE),
        budget=replace(comparison.budget, dtype=HOSTILE[0], equal=False, differences=HOSTILE),
    )


def _budget() -> Budget:
    return Budget(
        match="tokens",
        tokens=STEPS * BATCH_TOKENS,
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        sequence_length=256,
        dtype="float32",
        parameters=3_285_120,
        equal=True,
    )


def _data() -> Data:
    return Data(
        sources=("default corpus: the standard library of CPython 3.11.2",),
        hash="sha256:5d1f0c6be0c4f0a6a41f7a6f2f6f0e9f1d7b3f5a0a6f4f1c9b8e7d6c5b4a3f21",
        tokenizer="byte-level BPE, 4096 tokens, trained on the corpus",
        train_tokens=5_812_224,
        held_out_tokens=307_200,
        held_out_bytes=1_105_920,
        held_out_documents=412,
    )


def _run(name: str, seed: int) -> Run:
    noise = np.random.default_rng([seed, 7]).normal(scale=0.012)  # of the seed: shared by the pair
    own = np.random.default_rng([seed, list(OFFSETS).index(name), 11])
    loss = 4.108 + noise + OFFSETS[name] + own.normal(scale=0.0032)
    domains = {
        domain: DomainLoss(
            loss=loss + shift + float(own.normal(scale=0.004)), bits_per_byte=(loss + shift) / 2.5, tokens=51_200
        )
        for domain, shift in DOMAINS.items()
    }
    dense = name == "dense"
    return Run(
        seed=seed,
        held_out=HeldOut(loss=loss, perplexity=float(np.exp(loss)), bits_per_byte=loss / 2.4953, domains=domains),
        tokens_per_second=float(own.normal(loc=9_900 if dense else 7_700, scale=120)),
        peak_memory_bytes=int(1.31e9 if dense else 1.52e9),
        seconds=132.0,
        curve=_curve(loss, own),
        layers=() if dense else _layers(own, sub_layers=2 if name == "fine-grained" else 1),
    )


def _curve(final: float, own: np.random.Generator) -> tuple[CurvePoint, ...]:
    points = []
    for step in range(0, STEPS + 1, 4):
        smooth = final + (8.32 - final) * float(np.exp(-6.5 * (step / STEPS) ** 0.62)) * (1 - step / STEPS)
        held_out = smooth + float(own.normal(scale=0.002)) if step % 40 == 0 else None
        train = smooth - 0.05 + float(own.normal(scale=0.05))
        points.append(CurvePoint(step=step, tokens=step * BATCH_TOKENS, loss=train, held_out_loss=held_out))
    return tuple(points)


def _layers(own: np.random.Generator, sub_layers: int) -> tuple[LayerStatistics, ...]:
    """MoE layers, so many to a block."""
    layers = [_layer(i, sub_layers, own) for i in range(LAYERS)]
    return tuple(_composed(layers[i - 1], layer) if i % sub_layers else layer for i, layer in enumerate(layers))


def _composed(before: LayerStatistics, layer: LayerStatistics) -> LayerStatistics:
    """Independent choices, but that expert 1 always follows expert 0."""
    histogram = np.outer(before.load, layer.load)
    histogram[0] = 0.0
    histogram[0, 1] = before.load[0]
    figures = {"composed": 0.31, "rerouted": 0.27, "pair_information": 0.18, "pair_information_shuffled": 0.004}
    pairs = tuple(tuple(row.tolist()) for row in histogram)
    return replace(layer, figures=layer.figures | figures, pairs=pairs)


def _layer(depth: int, sub_layers: int, own: np.random.Generator) -> LayerStatistics:
    taste = own.normal(scale=0.25 + 0.3 * depth, size=(len(DOMAINS), EXPERTS))
    load = np.exp(taste) / np.exp(taste).sum(axis=1, keepdims=True)
    if depth == 0:
        load[:, 5] = 0.0
        load /= load.sum(axis=1, keepdims=True)
    overall = load.mean(axis=0)
    block, place = divmod(depth, sub_layers)
    return LayerStatistics(
        name=f"model.layers.{block}.feed_forward.{place}",
        label=f"{block}.{place}" if sub_layers > 1 else str(block),
        load=tuple(overall.tolist()),
        domain_load={domain: tuple(row.tolist()) for domain, row in zip(DOMAINS, load, strict=True)},
        figures={
            "max_vio_batch": float(overall.max() * EXPERTS - 1) + 0.08,
            "max_vio_data": float(overall.max() * EXPERTS - 1),
            "dead_experts": float((overall == 0).sum()),
            "entropy": 2.1 - 0.2 * depth,
            "confidence": 0.22 + 0.05 * depth,
            "mutual_information": 0.9 - 0.15 * depth,
            "domain_mutual_information": 0.04 + 0.05 * depth,
        },
    )


def _bootstrap(mean: float):
    own = np.random.default_rng(3)
    tokens = own.integers(200, 1500, size=412)
    first = tokens * own.normal(loc=4.1, scale=0.6, size=412)
    recipe = first + tokens * own.normal(loc=mean, scale=0.03, size=412)
    return document_bootstrap(recipe, first, tokens, resamples=499)


def failing(comparison: Comparison, seeds: dict[str, tuple[int, ...]]) -> Comparison:
    """The same where recipes diverged with some seeds; hostile text among the reasons."""

    def result(recipe: RecipeResult) -> RecipeResult:
        failed = seeds.get(recipe.name, ())
        lost = tuple(
            FailedRun(seed=seed, step=1_200 + seed if seed else None, reason=f"the loss is nan {HOSTILE[0]}\x1b[31m")
            for seed in failed
        )
        return replace(recipe, runs=tuple(run for run in recipe.runs if run.seed not in failed), failed=lost)

    recipes = [result(recipe) for recipe in comparison.recipes]
    losses = [
        [next((run.held_out.loss for run in recipe.runs if run.seed == seed), None) for seed in comparison.seeds]
        for recipe in recipes
    ]
    differences = (None, *compare_with_first(losses))
    judged = tuple(
        replace(recipe, difference=found, document_bootstrap=recipe.document_bootstrap if found else None)
        for recipe, found in zip(recipes, differences, strict=True)
    )
    return replace(comparison, recipes=judged)
