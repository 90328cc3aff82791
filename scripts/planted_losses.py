"""Bugs of losses that harm real weights, or that a log does not show."""

from planted_bug import Bug

BUGS = [
    Bug(
        "losses: the default orthogonality is in squared units of the hidden state",
        "adapters/aux_losses.py",
        'orthogonality_form: OrthogonalityForm = "cosine"',
        'orthogonality_form: OrthogonalityForm = "projection"',
        "test_loss_units",
    ),
    Bug(
        "losses: that of recipes too",
        "training/recipe.py",
        '["cosine", "weighted", "projection", "span"] = "cosine"',
        '["cosine", "weighted", "projection", "span"] = "span"',
        "test_loss_units",
    ),
    Bug(
        "losses: weighted cosines grow with the outputs' length",
        "losses/outputs.py",
        "per_token = (pair * off_diagonal(correlation(products).square())).sum((-2, -1))",
        "per_token = (pair * off_diagonal(products.square())).sum((-2, -1))",
        "test_loss_units",
    ),
]
