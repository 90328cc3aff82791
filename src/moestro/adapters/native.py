"""Switching off, for a while, the balance loss that a model computes by itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


@contextmanager
def native_balance_off(model: nn.Module) -> Iterator[None]:
    """Let the model not add its own auxiliary loss to its loss until the context ends; say so where it did."""
    config: Any = getattr(model, "config", None)
    configs = {id(c): c for c in (config, config.get_text_config() if hasattr(config, "get_text_config") else None)}
    changed = [c for c in configs.values() if c is not None and getattr(c, "output_router_logits", False)]
    for c in changed:
        c.output_router_logits = False
    if changed:
        logger.warning("the model's own balance loss is off while AuxLosses with a balance of their own are attached")
    try:
        yield
    finally:
        for c in changed:
            c.output_router_logits = True
