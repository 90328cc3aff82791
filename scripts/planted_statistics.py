"""Bugs of the statistics that a comparison prints, and of comparisons in which runs fail."""

from planted_bug import Bug

BUGS = [
    Bug(
        "verdicts: the old rule, a difference must also reach the minimum detectable effect",
        "statistics.py",
        "if difference.p_holm is not None and difference.p_holm < ALPHA:",
        "least = difference.minimum_detectable or 0.0\n"
        "    if difference.p_holm is not None and difference.p_holm < ALPHA and abs(difference.mean) >= least:",
        "test_verdicts",
    ),
    Bug(
        "verdicts: power as if the deviation were known",
        "power.py",
        "np.sqrt(stats.chi2.ppf(shares, freedom) / freedom)",
        "np.ones_like(shares)",
        "test_verdicts",
    ),
    Bug(
        "verdicts: power without Holm's adjustment",
        "statistics.py",
        "seeds, alpha = len(found.by_seed), ALPHA / tested",
        "seeds, alpha = len(found.by_seed), ALPHA",
        "test_verdicts",
    ),
    Bug(
        "verdicts: power of a one-sided test",
        "power.py",
        "alpha / 2, power, equivalence=False",
        "alpha, power, equivalence=False",
        "test_verdicts",
    ),
    Bug(
        "verdicts: no Holm over recipes",
        "statistics.py",
        "np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)",
        "p[order]",
        "test_verdicts",
    ),
    Bug(
        "verdicts: equivalence by one of the two tests",
        "statistics.py",
        "np.maximum(above, below)",
        "np.minimum(above, below)",
        "test_verdicts",
    ),
    Bug(
        "comparisons: a recipe that failed is judged by the seeds that are left",
        "statistics.py",
        "if failed or deviation is None or",
        "if deviation is None or",
        "test_report_failed",
    ),
    Bug(
        "comparisons: losses paired by place, not by seed",
        "report/curves.py",
        "_minus(curve, first[run.seed])",
        "_minus(curve, next(iter(first.values())))",
        "test_report_failed",
    ),
    Bug(
        "comparisons: a run that fails ends all",
        "attempts.py",
        "except (TrainingFailed, OSError) as error:",
        "except () as error:",
        "test_failed_runs",
    ),
    Bug(
        "verdicts: equivalence at twice the level",
        "statistics.py",
        'alternative="greater").pvalue',
        'alternative="greater").pvalue / 2',
        "test_verdicts",
    ),
]
