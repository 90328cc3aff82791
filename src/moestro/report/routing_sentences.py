"""What a routing study says, in words; the same in the report and in the terminal."""

from moestro.comparison import LayerStatistics
from moestro.inspection.measuring import Measured, RoutingStudy
from moestro.report.measures import CHANCE
from moestro.report.numbers import fixed, metric


def headline(study: RoutingStudy) -> str:
    """The plain answer."""
    first, *others = study.checkpoints
    if others:
        return f"{first.finding.name} and {others[0].finding.name}, side by side"
    return f"How {first.finding.name} routes: {verdict(first)}"


def verdict(checkpoint: Measured) -> str:
    """Dead experts, or how uneven the load is, in a few words."""
    return f"{alive(checkpoint)}, the busiest {fixed(busiest(checkpoint)[0], 1)} times its share"


def alive(checkpoint: Measured) -> str:
    """How many experts get no token."""
    experts = sum(len(layer.load) for layer in checkpoint.layers)
    dead = sum(share == 0 for layer in checkpoint.layers for share in layer.load)
    return f"{dead} of {experts} experts get no token" if dead else f"all {experts} experts get tokens"


def busiest(checkpoint: Measured) -> tuple[float, str, int]:
    """The largest load over an even one, the label of its layer, and the expert."""
    return max(
        (share * len(layer.load), layer.label, expert)
        for layer in checkpoint.layers
        for expert, share in enumerate(layer.load)
    )


def summary(checkpoint: Measured) -> str:
    """Load and specialisation of one checkpoint in one sentence."""
    times, label, expert = busiest(checkpoint)
    words = (
        f"{alive(checkpoint)}; the busiest, expert {expert} of layer {label}, gets {fixed(times, 1)} times its share"
    )
    if len(checkpoint.layers[0].domain_load) < 2:
        return f"{words}."
    excess, where = max((above_chance(layer, "domain_mutual_information"), layer.label) for layer in checkpoint.layers)
    return (
        f"{words}; domains part most in layer {where} ({fixed(excess, 3)} nats between domain and expert above chance)."
    )


def above_chance(layer: LayerStatistics, field: str) -> float:
    """A number of a layer minus what chance alone would give."""
    return (layer.figures.get(field) or 0.0) - (layer.figures.get(field + CHANCE) or 0.0)


def text_read(study: RoutingStudy) -> str:
    """What the models were given."""
    documents = sum(domain.documents for domain in study.domains.values())
    tokens = " and ".join(dict.fromkeys(metric(checkpoint.tokens) for checkpoint in study.checkpoints))
    size = metric(sum(domain.bytes for domain in study.domains.values()))
    return (
        f"{tokens} tokens ({size} bytes) of {documents:,} document{'' if documents == 1 else 's'} in "
        f"{len(study.domains)} domain{'' if len(study.domains) == 1 else 's'}, in sequences of "
        f"{study.sequence_length:,}, batches of {study.batch_tokens:,} tokens; {study.dtype}."
    )


def left_out(study: RoutingStudy) -> str:
    """How much text was not used; empty where all was."""
    size = sum(domain.left_out_bytes for domain in study.domains.values())
    return f"{metric(size)} bytes beyond --max-bytes per domain were left out." if size else ""


def tokens_differ(study: RoutingStudy) -> str:
    """A warning where losses per token cannot be compared; empty where they can."""
    if study.same_tokens:
        return ""
    return (
        "Each checkpoint read the text with a tokenizer of its own: loss and perplexity are per token of that one "
        "and cannot be compared; bits per byte can."
    )
