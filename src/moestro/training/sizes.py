"""The sizes that recipes come in: what recipes of one size share."""

from dataclasses import dataclass

from moestro.training.recipe import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One of them. `width` is D, the inner width of a full expert."""

    hidden_size: int
    num_layers: int
    num_heads: int
    width: int
    dense_width: int
    """Of the dense recipe."""
    every: int = 1
    vocab_size: int
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""
    paper: bool = False
    """Paper sizes have untied embeddings and no query-key norm, as in CartesianMoE's table."""
    training: Training


PAPER_TRAINING = Training(
    tokens=100_000_000_000,
    batch_tokens=2048 * 512,
    micro_batch_tokens=2048 * 4,
    sequence_length=2048,
    learning_rate=3e-4,
    warmup=0.01,
)

SIZES = {
    "tiny": Size(
        # Chosen for the lowest held-out bits per byte in a minute on one CPU core: docs/results/sizes.md.
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        width=128,
        dense_width=3 * 128,
        vocab_size=16_384,
        initializer_range=0.05,
        training=Training(
            tokens=350_000,
            batch_tokens=512,
            sequence_length=128,
            learning_rate=2e-3,
            beta2=0.99,
        ),
    ),
    "small": Size(
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        width=256,
        dense_width=3 * 256,
        vocab_size=8192,
        training=Training(tokens=4_000_000, batch_tokens=4096, sequence_length=512, learning_rate=3e-3),
    ),
    "base": Size(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        width=3072,
        dense_width=3072,
        every=2,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
    "large": Size(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        width=4096,
        dense_width=4096,
        every=2,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
    "7b": Size(
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        width=4096,
        dense_width=4096,
        vocab_size=32_000,
        paper=True,
        training=PAPER_TRAINING,
    ),
}
