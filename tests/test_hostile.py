"""Drawn hostility: whatever is typed, named, loaded or passed ends in one clean line, and nothing of it runs.

`scripts/hostile.py --draws 2000` draws more of the same.
"""

import random

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DRAWS = {"command line": 20, "recipe": 20, "arguments": 40, "checkpoint": 8, "tokenizer": 6, "adapter": 6, "data": 6}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", DRAWS)
def test_drawn_hostility_ends_in_one_clean_line(kind: str, tmp_path_factory: pytest.TempPathFactory):
    hostile.prepared()

    @settings(max_examples=DRAWS[kind], suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def ends_well(seed: int) -> None:
        folder = tmp_path_factory.mktemp("hostile")
        found = hostile.attempt(hostile.KINDS[kind](random.Random(seed), folder), folder)
        assert not found.problem, f"{found.problem}: {found.case}"

    ends_well()


def test_a_draw_is_a_function_of_its_seed(tmp_path):
    cases = [str(hostile.KINDS["command line"](random.Random(3), tmp_path)) for _ in range(2)]
    assert cases[0] == cases[1]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_hundreds_of_draws_of_every_kind():
    kinds = list(hostile.KINDS)
    failed = [result for number in range(270) if (result := hostile.outcome(number, 1, kinds)[1]).problem]
    assert not failed, [f"{result.problem}: {result.case}" for result in failed]
