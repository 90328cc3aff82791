"""examples/competition_theory.py against plain loops: likelihood, EM and Newton steps, and the Voronoi loss."""

import math
import re
import sys
from importlib import import_module
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian as hessian_of

sys.path.append(str(Path(__file__).parent.parent / "examples"))
theory = import_module("competition_theory")

MODELS = [theory.SOFTMAX, theory.COMPETITION]
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def small(model, experts=3, size=300, replications=2, seed=0):
    """A sample and a starting point of it."""
    generator = np.random.default_rng(seed)
    sample = theory.draw(model, size, replications, generator)
    return sample, theory.start(model, experts, replications, generator)


def loop_scores(model, experts, x):
    """s_i(x), expert by expert."""
    if not model.competition:
        return [gate * x + bias for gate, bias, *_ in experts]
    return [math.log(math.log1p(math.exp(weight * x + b))) + bias for _, bias, weight, b, _ in experts]


def loop_joint(model, experts, x, y):
    """log softmax_i(s(x)) + log N(y | a_i x + b_i, v_i), expert by expert."""
    scores = loop_scores(model, experts, x)
    total = math.log(sum(math.exp(score) for score in scores))
    gaussians = [
        -0.5 * (y - weight * x - b) ** 2 / math.exp(log_v) - 0.5 * math.log(2 * math.pi * math.exp(log_v))
        for _, _, weight, b, log_v in experts
    ]
    return [score - total + gaussian for score, gaussian in zip(scores, gaussians, strict=True)]


def points(sample, row):
    """(x, y, count) of the lattice points that a sample has."""
    columns = (sample.x.tolist(), sample.y.tolist(), sample.counts[row].tolist())
    return [point for point in zip(*columns, strict=True) if point[2]]


def loop_likelihood(model, experts, sample, row):
    return sum(
        count * math.log(sum(math.exp(term) for term in loop_joint(model, experts, x, y)))
        for x, y, count in points(sample, row)
    )


def loop_expected(model, experts, given, sample, row):
    """Q(experts | given): the expected complete log-likelihood, posteriors from `given`."""
    total = 0.0
    for x, y, count in points(sample, row):
        posterior = [math.exp(term) for term in loop_joint(model, given, x, y)]
        terms = loop_joint(model, experts, x, y)
        total += count * sum(p * term for p, term in zip(posterior, terms, strict=True)) / sum(posterior)
    return total


@each_model
def test_the_likelihood_is_that_of_plain_loops(model):
    sample, theta = small(model)
    theta = theta.clamp(-theory.BOUNDS, theory.BOUNDS)
    expected = [loop_likelihood(model, theta[row].tolist(), sample, row) for row in range(2)]
    assert model.objective(theta, sample).tolist() == pytest.approx(expected, rel=1e-12)


@each_model
def test_the_wall_is_half_the_squared_excess_for_each_point(model):
    sample, theta = small(model)
    theta[:, 0, theory.BIAS] = 2.5  # 0.5 beyond
    expected = loop_likelihood(model, theta[0].tolist(), sample, 0) - 300 * 0.5 * 0.25
    assert model.objective(theta, sample)[0].item() == pytest.approx(expected)


@each_model
def test_curvatures_are_second_derivatives(model):
    sample, theta = small(model)
    theta[0, 0, theory.BIAS] = 2.5
    complete, missing = theory.curvatures(model, theta, sample)
    for row in range(2):
        one = sample.only(torch.tensor([row]))
        hessian = hessian_of(lambda at, one=one: model.objective(at[None], one)[0], theta[row]).reshape(15, 15)
        torch.testing.assert_close(complete[row] - missing[row], -hessian, rtol=1e-9, atol=1e-8)
        with torch.no_grad():
            posterior = torch.softmax(model.scores(theta[row : row + 1], one.x, one.y)[1], 1)

        def expected(at, one=one, posterior=posterior):
            score, joint = model.scores(at[None], one.x, one.y)
            wall = 0.5 * (theory.beyond(at) ** 2).sum() * one.counts.sum()
            return (one.counts * (posterior * (joint - score.logsumexp(1, keepdim=True))).sum(1)).sum() - wall

        hessian = hessian_of(expected, theta[row]).reshape(15, 15)
        torch.testing.assert_close(complete[row], -hessian, rtol=1e-9, atol=1e-8)


@each_model
def test_em_never_lowers_the_likelihood_and_raises_what_it_expects(model):
    sample, theta = small(model)
    damping = torch.full((2,), 1e-2, dtype=torch.float64)
    before = model.objective(theta, sample)
    for number in range(15):
        after, damping, _ = theory.step(model, theta, sample, damping, em=True)
        if number == 0:
            expected = [loop_expected(model, at[0].tolist(), theta[0].tolist(), sample, 0) for at in (after, theta)]
            assert expected[0] > expected[1]
        value = model.objective(after, sample)
        assert (value >= before).all()
        theta, before = after, value


def test_an_exactly_specified_fit_is_a_fixed_point_of_the_closed_m_step():
    model = theory.SOFTMAX
    sample, theta = small(model, experts=2)
    theta, reached = theory.fit(model, theta, sample, em_steps=5, steps=100)
    assert reached.all()
    for expert, (_, _, weight, intercept, log_variance) in enumerate(theta[0].tolist()):
        x, y, count = np.array(points(sample, 0)).T
        joint = np.array([loop_joint(model, theta[0].tolist(), *at) for at in zip(x, y, strict=True)])
        share = count * np.exp(joint[:, expert]) / np.exp(joint).sum(1)
        design = np.sqrt(share)[:, None] * np.stack([x, np.ones_like(x)], 1)
        solved = np.linalg.lstsq(design, np.sqrt(share) * y, rcond=None)[0]
        variance = share @ (y - solved[0] * x - solved[1]) ** 2 / share.sum()
        assert [weight, intercept, math.exp(log_variance)] == pytest.approx([*solved, variance], rel=1e-4)


@each_model
def test_em_alone_and_newton_end_at_the_same_point_where_the_gradient_is_zero(model):
    sample, theta = small(model, experts=2, size=2000, replications=1)
    newton, reached = theory.fit(model, theta, sample, em_steps=0, steps=100)
    em, _ = theory.fit(model, theta, sample, em_steps=60, steps=60)
    assert reached.all()
    free = model.free(2)
    assert theory.gradient(model, newton, sample)[:, free].abs().max() < 1e-2  # of a sum over 2000 points
    torch.testing.assert_close(em, newton, atol=1e-3, rtol=0)


@each_model
def test_an_over_specified_fit_ends_no_lower_than_the_truth(model):
    sample, theta = small(model, experts=4, size=5000, replications=1)
    fitted, _ = theory.fit(model, theta, sample, em_steps=5, steps=25)
    assert (model.objective(fitted, sample) > model.objective(model.truth, sample)).all()


@each_model
def test_the_lattice_carries_a_density_also_of_the_narrowest_experts(model):
    x, y, area = theory.lattice(model)
    narrow = model.truth.clone()
    narrow[..., theory.LOG_VARIANCE] -= theory.BOUNDS[theory.LOG_VARIANCE]
    for theta in (model.truth, narrow):
        assert (area * model.log_density(theta, x, y).exp()).sum().item() == pytest.approx(1, abs=1e-8)
    assert theory.hellinger(model, model.truth).item() == 0
    assert theory.hellinger(model, narrow).item() > 0.1


def split(truth, copies=3):
    """The truth with its first expert written as copies of it that share its weight."""
    theta = torch.cat([truth[:, :1].expand(1, copies, -1), truth[:, 1:]], 1).clone()
    theta[:, :copies, theory.BIAS] -= math.log(copies)
    return theta


def loss(model, theta):
    return theory.voronoi_loss(theory.match(theta, model.truth), competition=model.competition).item()


@each_model
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_voronoi_loss_is_zero_at_the_truth_in_any_order_and_under_shifts_of_the_gate(model, copies):
    theta = split(model.truth, copies)
    for order in permutations(range(copies + 1)):
        assert loss(model, theta[:, order]) == pytest.approx(0, abs=1e-12)
    shifted = theta.clone()
    shifted[..., theory.BIAS] += 0.7
    if not model.competition:
        shifted[..., theory.GATE] -= 0.4
    assert loss(model, shifted) == pytest.approx(0, abs=1e-12)


@each_model
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_voronoi_loss_is_positive_elsewhere_with_the_stated_powers(model, copies):
    """Doubling one displacement multiplies the loss by 2 ** power: no other term is there."""
    order = {1: 1, 2: 4, 3: 6}[copies]
    if copies == 1:
        powers = {theory.GATE: 1, theory.WEIGHT: 1, theory.INTERCEPT: 1}
    elif model.competition:
        powers = {theory.WEIGHT: 2, theory.INTERCEPT: 2}
    else:
        powers = {theory.GATE: order, theory.WEIGHT: order // 2, theory.INTERCEPT: order}
    for parameter, power in powers.items():
        losses = []
        for displacement in (0.1, 0.2):
            theta = split(model.truth, copies)
            theta[0, 0, parameter] += displacement
            losses.append(loss(model, theta))
        assert losses[0] > 0
        assert losses[1] / losses[0] == pytest.approx(2**power)
    of_variance = 1 if copies == 1 else 2 if model.competition else order // 2
    theta = split(model.truth, copies)
    theta[0, 0, theory.LOG_VARIANCE] = math.log(theory.VARIANCE + 0.3)
    assert loss(model, theta) == pytest.approx(0.3**of_variance / copies)
    theta = split(model.truth, copies)
    theta[0, :copies, theory.BIAS] += math.log(1.25)  # the cell weighs 1.25
    assert loss(model, theta) == pytest.approx(0.25)


def test_errors_of_parameters_are_those_of_shared_cells():
    model = theory.COMPETITION
    theta = split(model.truth, 2)
    theta[0, 0, theory.INTERCEPT] += 0.3
    theta[0, 2, theory.INTERCEPT] += 5  # alone in its cell
    assert theory.squared_errors(theory.match(theta, model.truth)).tolist() == [pytest.approx([0, 0, 0.09 / 2, 0])]
    alone = model.truth.clone()
    alone[0, 1, theory.INTERCEPT] += 1
    assert theory.squared_errors(theory.match(alone, model.truth))[0, 2].item() == pytest.approx(1 / 2)


def test_slopes_and_intervals_of_errors_that_follow_a_power_law():
    sizes = (100, 1000, 10_000)
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=(3, 50, 7)))
    values = np.array(sizes, dtype=float)[:, None, None] ** -0.5 * noise
    flags = np.ones((3, 50), dtype=bool)
    slopes, (low, high) = theory.Outcome(values, flags, flags, flags).slopes(sizes)
    np.testing.assert_allclose(slopes, [-0.5] * 3 + [-0.25] * 4, atol=0.02)  # parameters come squared
    assert (low < slopes).all() and (slopes < high).all()


def test_it_runs_end_to_end_and_repeats_itself(capsys, monkeypatch):
    monkeypatch.setattr(theory, "BOOTSTRAP", 20)
    study = theory.Study(sizes=(300, 1000), experts=(3,), replications=2, starts=2, em_steps=2, steps=6)
    printed = []
    for _ in range(2):
        theory.main(study)
        printed.append(re.sub(r"\d+ s", "", capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert "| expert intercept b | 3 | " in printed[0]
    with pytest.raises(SystemExit, match="known for 2, 3 and 4"):
        theory.main(theory.Study(experts=(5,)))
