import json
import math
from dataclasses import replace

import pytest

from comparison_fixture import hostile, make_comparison
from moestro.comparison import Comparison
from moestro.errors import Misuse
from moestro.records import dumps, loads, read_record, write_record


@pytest.mark.parametrize(
    "comparison",
    [make_comparison(), make_comparison((0,)), hostile(make_comparison((3, 5)))],
    ids=["three seeds", "one seed", "hostile"],
)
def test_what_is_written_is_read_back(comparison, tmp_path):
    path = tmp_path / "comparison.json"
    write_record(comparison, path)
    assert read_record(Comparison, path) == comparison
    assert path.read_text(encoding="ascii")  # no byte of it steers a terminal


def test_the_file_is_plain_json():
    def refuse(constant: str):
        raise AssertionError(constant)

    content = json.loads(dumps(make_comparison()), parse_constant=refuse)
    assert content["recipes"][0]["difference"] is None
    assert content["recipes"][2]["difference"]["verdict"] == "better"
    assert content["recipes"][1]["runs"][0]["layers"][0]["figures"]["dead_experts"] == 1


def test_a_number_that_is_not_finite_is_refused_by_name():
    comparison = make_comparison((0,))
    run = replace(comparison.recipes[1].runs[0], tokens_per_second=math.nan)
    recipes = (comparison.recipes[0], replace(comparison.recipes[1], runs=(run,)))
    with pytest.raises(ValueError, match=r"comparison.recipes\[1\].runs\[0\].tokens_per_second must be finite"):
        dumps(replace(comparison, recipes=recipes))


def _changed(change) -> str:
    content = json.loads(dumps(make_comparison((0,))))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("seeds"), r"comparison must have the fields .* missing or unknown: seeds"),
        (lambda c: c.update(extra=1), "missing or unknown: extra"),
        (lambda c: c.update(recipes={}), "comparison.recipes must be a JSON array, got object"),
        (lambda c: c.update(version=None), "comparison.version must be a JSON string, got null"),
        (
            lambda c: c["budget"].update(match="time"),
            "comparison.budget.match must be one of 'tokens', 'flops', got 'time'",
        ),
        (lambda c: c["budget"].update(steps=True), "comparison.budget.steps must be a JSON integer, got boolean"),
        (
            lambda c: c.update(gzip_bits_per_byte=math.inf),
            "comparison.gzip_bits_per_byte must be finite or null, got inf",
        ),
        (lambda c: c.update(recipes=[]), "a comparison must hold at least one recipe"),
        (lambda c: c.update(seeds=[0, 1]), r"one run per seed \[0, 1\], in that order; dense has \[0\]"),
        (
            lambda c: c["recipes"][1]["document_bootstrap"].update(interval=[1.0]),
            r"recipes\[1\].document_bootstrap.interval must have 2 items, got 1",
        ),
    ],
)
def test_another_shape_is_refused_with_its_place(change, message):
    with pytest.raises(Misuse, match=message):
        loads(Comparison, _changed(change))


def test_whole_numbers_may_stand_for_floats():
    assert loads(Comparison, _changed(lambda c: c.update(gzip_bits_per_byte=3))).gzip_bits_per_byte == 3.0


@pytest.mark.parametrize("content", [b"", b'{"version": ', b"\xff\xfe"])
def test_a_truncated_file_is_refused_by_name(content, tmp_path):
    path = tmp_path / "comparison.json"
    path.write_bytes(content)
    with pytest.raises(Misuse, match=r"comparison.json must hold JSON"):
        read_record(Comparison, path)
