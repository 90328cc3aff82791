"""Recipes hold every auxiliary loss that can be attached, and refuse what these refuse."""

from dataclasses import fields

import pytest

from moestro import AuxLosses, Misuse
from moestro.training.recipe import Losses
from moestro.training.recipes import recipe


def test_a_recipe_can_ask_for_every_loss():
    settable = {f.name for f in fields(AuxLosses) if f.init}
    # Pretraining has no prompts, and competition is a part of the recipe by itself.
    assert {f.name for f in fields(Losses)} == settable - {"mask_prompt", "compete"}


@pytest.mark.parametrize("field", ["orthogonality", "variance", "warmup_steps", "variance_cap"])
def test_losses_are_checked_with_the_recipe(field: str):
    with pytest.raises(Misuse, match=f"{field} must be"):
        recipe(f"smoe:{field}=-1", "tiny")
