"""Where MoE layers are, in few words: "layers 1 to 26"."""

import re
from collections.abc import Sequence
from itertools import groupby

from moestro.adapters.layers import block_number
from moestro.routing import MoELayer

ORDINALS = ("first", "second", "third", "fourth")


def places(layers: Sequence[MoELayer]) -> str:
    """The blocks of these layers, stack by stack where there are several."""
    stacks: dict[str, list[int]] = {}
    for layer in layers:
        stacks.setdefault(re.sub(r"\.?\d+$", "", layer.block), []).append(block_number(layer))
    if len(stacks) == 1:
        return spans(next(iter(stacks.values())))
    return "; ".join(f"{stack}: {spans(numbers)}" for stack, numbers in stacks.items())


def in_blocks(layers: Sequence[MoELayer]) -> dict[str, list[MoELayer]]:
    """Where blocks hold several MoE layers: all that are the first of theirs, all that are the second, and so on."""
    blocks = [layer.block for layer in layers]
    several = [i for i, block in enumerate(blocks) if blocks.count(block) > 1]
    found: dict[str, list[MoELayer]] = {}
    for i in several:
        found.setdefault(ordinal(blocks[:i].count(blocks[i])), []).append(layers[i])
    return found


def ordinal(index: int) -> str:
    """ "first" for 0, and so on."""
    return ORDINALS[index] if index < len(ORDINALS) else f"{index + 1}th"


def spans(numbers: Sequence[int]) -> str:
    """Block numbers as "layers 0, 2 and 5 to 7"; says so where each holds several MoE layers."""
    distinct = sorted(set(numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(distinct), key=lambda pair: pair[1] - pair[0])]
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    words = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    each = f" ({len(numbers) // len(distinct)} in each)" if len(numbers) > len(distinct) else ""
    return f"layer{'' if len(distinct) == 1 else 's'} {words}{each}"
