"""What the comparison says, in words; the same in the report and in the terminal."""

from collections.abc import Callable

from moestro.comparison import LEAST_LEARNT, Comparison, RecipeResult, Run, Sweep
from moestro.data.overlap import SPAN
from moestro.difference import MIN_SEEDS, Difference, Verdict
from moestro.report.numbers import decimals_for, fixed, mean, metric, signed

TOKENS_PER_EXPERT = 16
"""Held-out tokens per expert that a text must have before an expert without tokens counts as dead."""


def headline(comparison: Comparison) -> str:
    """The plain answer."""
    first, *others = comparison.recipes
    failed, sound = [r.name for r in others if r.failed], [r for r in others if not r.failed]
    if not any(result.runs for result in comparison.recipes):
        return "Every run failed"
    if all(run.learnt_nothing for result in comparison.recipes for run in result.runs):
        return "No run learnt anything: none predicts held-out text better than chance"
    if not first.runs:
        return f"{first.name} failed with every seed: there is nothing to compare with"
    if not others:
        loss = mean([run.held_out.loss for run in first.runs])
        return f"{first.name} reaches {fixed(loss)} nats per token on held-out text"
    if not sound:
        return f"{_listed(failed)} failed: there is nothing to compare with {first.name}"
    return _answer(first, sound, decimals_of(comparison)) + (f"; {_listed(failed)} failed" if failed else "")


def _answer(first: RecipeResult, others: list[RecipeResult], decimals: int) -> str:
    """Return the answer for recipes without failed runs, compared with the first."""
    seeds = max((len(result.difference.by_seed) for result in others if result.difference), default=0)
    if seeds < MIN_SEEDS:
        return f"Too few seeds to rank: {seeds} of the {MIN_SEEDS} that it takes"
    better = _with_verdict(others, "better")
    worse = [result.name for result in _with_verdict(others, "worse")]
    if len(better) == 1 and (found := better[0].difference):
        little = f", less than the margin of {found.margin:g}" if found.within_margin else ""
        return f"{better[0].name} beats {first.name} by {fixed(-found.mean, decimals)} nats per token{little}"
    if better:
        return f"{_listed([result.name for result in better])} beat {first.name} on held-out text"
    if len(worse) == len(others):
        return f"{first.name} beats {_listed(worse)} on held-out text"
    if worse:
        return f"Nothing beats {first.name}; {_listed(worse)} {_is(worse)} worse"
    equivalent = _with_verdict(others, "equivalent")
    if equivalent and (found := equivalent[0].difference):
        names = [result.name for result in equivalent]
        differs = "it differs" if len(names) == 1 else "each differs"
        said = f"{_listed(names)} {_is(names)} equivalent to {first.name}"
        return f"{said}: {differs} from it by less than {found.margin:g} nats per token"
    return f"No difference from {first.name} stands out of the noise of {seeds} seeds"


def learnt_nothing(run: Run) -> str:
    """Say that a run learnt nothing, and by which baseline; empty if it learnt."""
    if not run.learnt_nothing:
        return ""
    known = "token frequencies alone" if run.chance == run.held_out.unigram else "a blind guess"
    loss = fixed(run.held_out.loss)
    return f"learnt nothing: its held-out loss of {loss} is not {LEAST_LEARNT:g} below {known} ({fixed(run.chance)})"


def most_are_dead(run: Run) -> str:
    """Say that most experts of a run are dead; empty if they are not, or if the text is too short to tell."""
    tokens = sum(domain.tokens for domain in run.held_out.domains.values())
    dead = sum(layer.figures.get("dead_experts") or 0 for layer in run.layers)
    experts = sum(len(layer.load) for layer in run.layers)
    short = any(tokens < TOKENS_PER_EXPERT * len(layer.load) for layer in run.layers)
    return "" if short or 2 * dead <= experts else f"{dead:.0f} of {experts} experts are dead"


def did_not_learn(run: Run) -> str:
    """Say that a run learnt nothing or that most of its experts are dead; empty for a sound run."""
    return " and ".join(words for words in (learnt_nothing(run), most_are_dead(run)) if words)


def warnings(comparison: Comparison) -> list[str]:
    """Return one line for each run that did not learn."""
    every = ((result.name, run) for result in comparison.recipes for run in result.runs)
    return [f"{name} seed {run.seed}: {words}" for name, run in every if (words := did_not_learn(run))]


def verdict(comparison: Comparison, result: RecipeResult) -> Verdict | None:
    """Return the verdict on a recipe; None for the first recipe unless it failed."""
    if result.failed:
        return "failed"
    if result is comparison.recipes[0]:
        return None
    return result.difference.verdict if result.difference else "not answered"


def failed(result: RecipeResult) -> list[str]:
    """Return one phrase for each failed run of a recipe, with the step if it diverged."""
    how = ["failed" if run.step is None else f"diverged at step {run.step:,}" for run in result.failed]
    return [f"seed {run.seed} {what}" for run, what in zip(result.failed, how, strict=True)]


def failures(comparison: Comparison) -> str:
    """Say how many runs failed, by recipe and seed; empty if none did."""
    lost = [f"{result.name} ({'; '.join(failed(result))})" for result in comparison.recipes if result.failed]
    if not lost:
        return ""
    runs, failed_runs = len(comparison.recipes) * len(comparison.seeds), sum(len(r.failed) for r in comparison.recipes)
    return f"{failed_runs} of {_counted(runs, 'run')} failed: {', '.join(lost)}"


def budget(comparison: Comparison) -> str:
    """What was compared, on what."""
    b, count, seeds = comparison.budget, len(comparison.recipes), len(comparison.seeds)
    recipes = "One recipe" if count == 1 else f"{count} recipes"
    of_each = f"{metric(b.tokens)} tokens ({b.steps:,} steps of {b.batch_tokens:,})"
    if b.match == "flops":
        of_each = f"the training FLOPs that {comparison.recipes[0].name} spends on {of_each}"
    trained = f"{recipes}, about {metric(b.parameters)} active parameters each, trained with {_counted(seeds, 'seed')}"
    return f"{trained} on {of_each} in sequences of {b.sequence_length:,}, {b.dtype}."


def held_out(comparison: Comparison) -> str:
    """What the endpoint is measured on."""
    d = comparison.data
    domains = len({name for recipe in comparison.recipes for run in recipe.runs for name in run.held_out.domains})
    documents = f"{_counted(d.held_out_documents, 'document')} or parts of documents"
    size = f"{metric(d.held_out_tokens)} tokens ({documents}, {_counted(domains, 'domain')})"
    measured = f"Measured on held-out text that no run trained on: {size}."
    return measured if d.overlap is None else f"{measured} {overlap(d.overlap)}"


def overlap(share: float) -> str:
    """Say how much of the held-out text also occurs in training text."""
    return f"{100 * share:.2f} % of it also occurs in training text, in spans of {SPAN} characters or more."


def sweep(comparison: Comparison) -> str:
    """How learning rates were chosen; empty where the recipes said them."""
    found = comparison.sweep
    if found is None:
        return ""
    count = len({result.learning_rate for results in found.screened.values() for result in results})
    rates = "one learning rate" if count == 1 else f"each of {count} learning rates"
    tokens = " to ".join(dict.fromkeys(metric(of(found.tokens.values())) for of in (min, max)))
    trained = f"trained at {rates} with seed {found.seed} on {tokens} tokens"
    if comparison.seeds == (found.seed,):
        return f"Every recipe was {trained}. What is compared are these very runs, each recipe's best: one seed."
    return f"Every recipe was first {trained}, then compared at its best. No interval contains that seed."


def edge(comparison: Comparison) -> str:
    """Which recipes need a wider grid; empty where none does."""
    found = comparison.sweep
    if found is None:
        return ""
    ends = {"lowest": at_the_edge(found, min), "highest": at_the_edge(found, max)}
    said = [f"at the {end} learning rate: {_listed(names)}" for end, names in ends.items() if names]
    if not said:
        return ""
    return f"Best {'; '.join(said)}. The true best may lie beyond: add learning rates there, finished runs are kept."


def at_the_edge(found: Sweep, end: Callable[[list[float]], float]) -> list[str]:
    """Recipes whose best learning rate is the lowest (`end` is min) or highest (max) of several that were tried."""
    tried = {name: [result.learning_rate for result in results] for name, results in found.screened.items()}
    return [name for name, rate in found.chosen.items() if len(tried[name]) > 1 and rate == end(tried[name])]


def difference(comparison: Comparison, result: RecipeResult) -> str:
    """Return the difference from the first recipe, as in "0.012 nats lower than dense [0.004, 0.020], 3 seeds"."""
    found, first = result.difference, comparison.recipes[0].name
    if result is comparison.recipes[0]:
        return "what the others are compared to"
    if found is None:
        return f"no seed with which both it and {first} finished"
    decimals = decimals_of(comparison)
    size = fixed(abs(found.mean), decimals)
    seeds = _counted(len(found.by_seed), "seed")
    if found.mean == 0:
        return f"equal to {first}, {seeds}"
    lower = found.mean < 0
    words = f"{size} nats {'lower' if lower else 'higher'} than {first}"
    if found.interval is None:
        return f"{words}, {seeds}"
    ends = sorted(-end if lower else end for end in found.interval)
    return f"{words} [{', '.join(fixed(end, decimals) for end in ends)}], {seeds}"


def reason(comparison: Comparison, result: RecipeResult) -> str:
    """Return the reason for the verdict; empty if "better" or "worse" needs none."""
    found = result.difference
    if result.failed:
        return "; ".join(f"seed {run.seed}: {run.reason}" for run in result.failed)
    if found is None:
        return ""
    if found.verdict == "too few seeds to rank":
        return f"an interval takes {MIN_SEEDS} seeds"
    if found.p_holm is None:
        return "every seed gave the same difference, which says nothing about noise"
    if found.verdict == "not answered":
        p = " and ".join(fixed(p, 2) for p in (found.p_holm, found.p_equivalence_holm) if p is not None)
        shown = (
            "no difference"
            if found.margin is None
            else f"neither a difference nor equivalence within {found.margin:g} nats"
        )
        return f"{shown} is shown (p = {p}{_adjusted(comparison)})"
    if found.verdict == "equivalent":
        return f"the true difference is below the margin of {found.margin:g} nats"
    return f"by less than the margin of {found.margin:g} nats" if found.within_margin else ""


def noise(comparison: Comparison, result: RecipeResult) -> str:
    """Say which difference and which margin a new comparison of this size detects."""
    found, first = result.difference, comparison.recipes[0].name
    if found is None:
        return ""
    decimals = decimals_of(comparison)
    if found.minimum_detectable is not None and found.minimum_margin is not None:
        effect, margin = fixed(found.minimum_detectable, decimals), fixed(found.minimum_margin, decimals)
        said = f"A new study of this size detects a true difference of {effect} nats four times in five, and "
        said += f"shows an equal recipe equivalent to {first} within {margin} nats as often"
        return f"{said}; more often if the same is true of other recipes." if _tested(comparison) > 1 else f"{said}."
    if found.verdict == "failed":
        return "It failed with some seeds, so its results with other seeds are not comparable."
    if found.verdict == "too few seeds to rank":
        by_seed = ", ".join(signed(value, decimals) for value in found.by_seed)
        return f"By seed: {by_seed}. How much of it is noise takes {MIN_SEEDS} seeds to say."
    return "Every seed gave the same difference: the seeds varied nothing, and noise cannot be told."


def rule(comparison: Comparison) -> str:
    """Explain the rule of the verdicts and its error rates."""
    margins = [r.difference.margin for r in comparison.recipes if r.difference and r.difference.margin is not None]
    margin = f" of {margins[0]:g} nats" if margins else ""
    several = _tested(comparison) > 1
    of_any, adjusted = (" of any recipe", ", adjusted over recipes by Holm's method,") if several else ("", "")
    share = "at most 5 %" if several else "5 %"
    return (
        f"A recipe is better or worse if the p-value of the paired t test over seeds{adjusted} is below 0.05: where no "
        f"recipe differs, {share} of comparisons claim a difference{of_any}. Otherwise it is equivalent if two "
        f"one-sided t tests at the same level{adjusted} show that the true difference is below the margin{margin}: "
        f"this is claimed{of_any} by at most 5 % of comparisons where the true difference is the margin or more."
    )


def beside_intervals(comparison: Comparison) -> str:
    """Explain why an interval may seem to contradict the verdict beside it."""
    said = "The 95 % interval of an equivalent recipe may exceed the margin: two one-sided tests match a 90 % interval."
    if _tested(comparison) < 2:
        return said
    unadjusted = (
        "Intervals are not adjusted for the number of recipes: one that excludes zero may accompany “not answered”."
    )
    return f"{said} {unadjusted}"


def decimals_of(comparison: Comparison) -> int:
    """Decimals for differences: two digits of the least noise, the same for all recipes so that columns align."""
    return max((decimals_for(_spread(r.difference)) for r in comparison.recipes if r.difference is not None), default=3)


def _spread(found: Difference) -> float:
    if found.interval is not None:
        return (found.interval[1] - found.interval[0]) / 2
    return max(map(abs, found.by_seed))  # their mean may be next to nothing by cancelling


def _tested(comparison: Comparison) -> int:
    """Return the number of recipes that the p-values are adjusted for."""
    return sum(r.difference is not None and r.difference.p is not None for r in comparison.recipes)


def _adjusted(comparison: Comparison) -> str:
    return " by Holm's method" if _tested(comparison) > 1 else ""


def _with_verdict(results: list[RecipeResult], verdict: Verdict) -> list[RecipeResult]:
    """Those results, the lowest mean first."""
    found = [(r.difference.mean, i) for i, r in enumerate(results) if r.difference and r.difference.verdict == verdict]
    return [results[i] for _, i in sorted(found)]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
