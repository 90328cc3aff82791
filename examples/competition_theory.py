"""How fast over-specified experts are learnt, under softmax gating and under competition: the theory by simulation.

A Gaussian mixture of k* = 2 experts of one covariate is drawn from, and fitted with k >= k* experts:

    p(y | x) = sum_i softmax_i(s_i(x)) N(y | h_i(x), v_i),    h_i(x) = a_i x + b_i
    softmax gating:  s_i(x) = beta1_i x + beta0_i             (arXiv:2305.03288)
    competition:     s_i(x) = log softplus(h_i(x)) + beta0_i  (arXiv:2402.02526, 2505.13380)

Competition weighs an expert by its own response, softplus(h_i), against that of all. exp(beta0_i) is the weight of the
atom (h_i, v_i) in the theory's mixing measure; without it k > k* experts could not be k* ones: two copies count twice.

Measured for growing n, as slopes of log error in log n with intervals bootstrapped over replications: the Hellinger
distance of the densities, the Voronoi loss of the parameters, and the error of each kind of parameter where several
fitted experts share a true one.

Data. x takes a few values, y is recorded on a lattice of 0.4 standard deviations of the noise. The sum of a Gaussian
over such a lattice is its integral to 11 digits or more, so the mixture stays well specified, while a sample of any
size is a table of counts: ten million points cost what a thousand do.

Fits. They start near the truth, as the simulations of the theory's papers do: the spare experts split the first true
one (`start`). So local optima far away do not decide the result; nor does it say that training would find the near one.
EM steps come first, then Newton's method on the same likelihood, for EM slows down on the flat ground of a shared cell
(--em-steps 500 --steps 500 is EM alone). Parameters are kept in a bounded set, as the theory assumes, by a quadratic
wall; no expert can fade away in it, which would make its other parameters arbitrary.

    python examples/competition_theory.py
    python examples/competition_theory.py --sizes 1000 10000 100000 --replications 16 --experts 2 3
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

PARAMETERS = 5  # of one expert, in this order
GATE, BIAS, WEIGHT, INTERCEPT, LOG_VARIANCE = range(PARAMETERS)

VARIANCE = 4.0
# The expert that is split comes first. The last one's gate is zero: gates are known up to a shift.
TRUTH = torch.tensor(
    [[1.5, 0.0, 6.0, 2.0, math.log(VARIANCE)], [0.0, 0.0, -6.0, 2.0, math.log(VARIANCE)]], dtype=torch.float64
)
BOUNDS = torch.tensor([6.0, 2.0, 12.0, 12.0, 1.5], dtype=torch.float64)  # the last one about log VARIANCE
START_SPREAD = torch.tensor([0.3, 0.3, 0.6, 0.6, 0.3], dtype=torch.float64)

COVARIATES = 12  # values of x
LATTICE = 0.4  # spacing of y in standard deviations of the noise
TAILS = 6  # standard deviations of the noise that the lattice goes beyond the experts' means

KNOWN_ORDERS = {1: 1, 2: 4, 3: 6}  # r-bar of 2305.03288 by experts in a cell: least r that makes its system unsolvable
TOLERANCE = 1e-6  # nats that Newton's method still expects to gain of the whole sample
KICK = 0.1  # length of a kick, in units of the parameters
MOST_DAMPING = 1e3
BOOTSTRAP = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is simulated."""

    sizes: tuple[int, ...] = tuple(round(10 ** (exponent / 2)) for exponent in range(6, 15))
    """Sample sizes n."""
    experts: tuple[int, ...] = (2, 3, 4)
    """Numbers of fitted experts k; the truth has 2."""
    replications: int = 32
    starts: int = 1
    """Starting points of each fit; the likeliest optimum is kept."""
    em_steps: int = 10
    """EM steps before Newton's method."""
    steps: int = 2000
    """Steps in all, at most."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A table of counts of R samples over the S points of the lattice."""

    x: Tensor  # (S)
    y: Tensor  # (S)
    counts: Tensor  # (R, S)

    def only(self, rows: Tensor) -> "Sample":
        """The samples of these rows."""
        return Sample(self.x, self.y, self.counts[rows])


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two classes. Parameters theta are (R, k, 5); competition holds the gate's slope at zero."""

    name: str
    competition: bool

    @property
    def truth(self) -> Tensor:
        """The true parameters, (1, 2, 5)."""
        truth = TRUTH.clone()
        if self.competition:
            truth[:, GATE] = 0
        return truth[None]

    def free(self, experts: int) -> Tensor:
        """Which of the k * 5 parameters are fitted: not the last expert's gate (a shift), nor competition's slopes."""
        fitted = torch.ones(experts, PARAMETERS, dtype=torch.bool)
        fitted[-1, [GATE, BIAS]] = False
        fitted[:, GATE] &= not self.competition
        return fitted.flatten()

    def response(self, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rho(h) = log softplus(h) with its first two derivatives in h; zero under softmax gating."""
        if not self.competition:
            zero = torch.zeros_like(mean)
            return zero, zero, zero
        softplus, sigmoid = torch.logaddexp(mean, torch.zeros_like(mean)), torch.sigmoid(mean)
        first = sigmoid / softplus
        return softplus.log(), first, first * (1 - sigmoid) - first**2

    def scores(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """s_i(x) and s_i(x) + log N(y | h_i(x), v_i), both (R, k, S)."""
        gate, bias, weight, intercept, log_variance = theta[..., None].unbind(-2)
        mean = weight * x + intercept
        score = gate * x + bias + self.response(mean)[0]
        squares = (y - mean) ** 2 * torch.exp(-log_variance)
        return score, score - 0.5 * (squares + log_variance + math.log(2 * math.pi))

    def log_density(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) = logsumexp_i(s_i + log N_i) - logsumexp_i(s_i), (R, S)."""
        score, joint = self.scores(theta, x, y)
        return joint.logsumexp(1) - score.logsumexp(1)

    def objective(self, theta: Tensor, sample: Sample) -> Tensor:
        """Log-likelihood of each sample, with the wall, (R)."""
        likelihood = (sample.counts * self.log_density(theta, sample.x, sample.y)).sum(-1)
        return likelihood - sample.counts.sum(-1) * 0.5 * (beyond(theta) ** 2).sum((1, 2))


SOFTMAX, COMPETITION = Model("softmax gating", competition=False), Model("competition", competition=True)


def beyond(theta: Tensor) -> Tensor:
    """How far each parameter is outside its bounds, signed; the wall is half its square, per point of the sample."""
    offset = theta.clone()
    offset[..., LOG_VARIANCE] -= math.log(VARIANCE)
    return offset - offset.clamp(-BOUNDS, BOUNDS)


def gradient(model: Model, theta: Tensor, sample: Sample) -> Tensor:
    """The objective's gradient, (R, 5k)."""
    return torch.func.grad(lambda at: model.objective(at, sample).sum())(theta).flatten(1)


def curvatures(model: Model, theta: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """The complete-data information and what is missing of it, both (R, 5k, 5k), at theta, (R, k, 5).

    EM climbs by C = E[-d2 log p(y, z | x) | y], the wall included. The observed information is C - M (Louis), with
    M = Cov[d log p(y, z | x) | y] for the expert z that is hidden.
    """
    x, y, counts = sample.x, sample.y, sample.counts[:, None]
    score, joint = model.scores(theta, x, y)
    prior, posterior = torch.softmax(score, 1), torch.softmax(joint, 1)
    _, _, weight, intercept, log_variance = theta[..., None].unbind(-2)
    mean = weight * x + intercept
    residual = (y - mean) * torch.exp(-log_variance)
    _, slope, bend = model.response(mean)

    design = torch.stack([x, torch.ones_like(x)])  # dh / d(a, b)
    in_mean = counts * ((posterior - prior) * bend - posterior * torch.exp(-log_variance))
    in_both = -counts * posterior * residual
    second = torch.zeros(*theta.shape, PARAMETERS, dtype=theta.dtype)
    second[..., 2:4, 2:4] = (in_mean[:, :, None] * design) @ design.T
    second[..., 2:4, 4] = second[..., 4, 2:4] = in_both @ design.T
    second[..., 4, 4] = 0.5 * (in_both * (y - mean)).sum(-1)

    one, zero, x = torch.ones_like(mean), torch.zeros_like(mean), x.expand_as(mean)
    of_score = torch.stack([x, one, slope * x, slope, zero], 2)  # (R, k, 5, S)
    of_joint = of_score + torch.stack([zero, zero, residual * x, residual, 0.5 * ((y - mean) * residual - 1)], 2)
    wall = torch.diag_embed(sample.counts.sum(-1, keepdim=True) * (beyond(theta) != 0).flatten(1))
    complete = covariance(of_score, prior, counts) - on_diagonal(second) + wall
    return complete, covariance(of_joint, posterior, counts)


def covariance(vectors: Tensor, shares: Tensor, counts: Tensor) -> Tensor:
    """Sum over the sample of Cov[vector of expert z, in z's five places] for z drawn by the shares, (R, 5k, 5k)."""
    mean = vectors * shares[:, :, None]
    within = on_diagonal((mean * counts[:, :, None]) @ vectors.mT)
    mean = mean.flatten(1, 2)
    return within - (mean * counts) @ mean.mT


def on_diagonal(blocks: Tensor) -> Tensor:
    """(R, k, 5, 5) to the block-diagonal (R, 5k, 5k)."""
    size = blocks.shape[1] * PARAMETERS
    places = torch.eye(blocks.shape[1], dtype=blocks.dtype)
    return torch.einsum("rkij,kl->rkilj", blocks, places).reshape(-1, size, size)


def fit(model: Model, theta: Tensor, sample: Sample, *, em_steps: int, steps: int) -> tuple[Tensor, Tensor]:
    """Theta, (R, k, 5), at the optimum near the one given, and whether that was reached, (R).

    EM steps first, each a Newton step on the expected complete log-likelihood (a generalised EM), then Newton's method.
    """
    theta = theta.clone()
    damping = torch.full_like(sample.counts[:, 0], 1e-2)
    going = torch.ones_like(damping, dtype=torch.bool)
    for number in range(steps):
        if not going.any():
            break
        is_em = number < em_steps
        theta[going], damping[going], resting = step(model, theta[going], sample.only(going), damping[going], em=is_em)
        going[going.clone()] = is_em | ~resting
    return theta, ~going


def step(model: Model, theta: Tensor, sample: Sample, damping: Tensor, *, em: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One step up of each row, or none: theta and damping after it, and whether theta was at rest, a local optimum.

    The step is (|C| + damping)^-1 gradient, C the curvature per point, |C| by eigenvalues, so that saddles are left
    upwards; the damping falls with success. EM takes it if the likelihood rises. Newton's method takes the highest of
    three: this step; the same bent by a second solve from its end, along the ridge on which the experts of a cell trade
    the spread of their means for variance; a kick along the flattest direction, which parts two experts that have
    become the same, where the gradient vanishes by symmetry. At rest: it expects a gain below TOLERANCE and the kick
    brings none, or no step rises however short (at the edge of the wall).
    """
    size, free = sample.counts.sum(-1)[:, None], model.free(theta.shape[1])
    complete, missing = curvatures(model, theta, sample)
    curvature = complete if em else complete - missing
    values, vectors = torch.linalg.eigh(curvature[:, free][:, :, free] / size[..., None])

    def slopes(at: Tensor) -> Tensor:
        return (vectors.mT @ gradient(model, at, sample)[:, free, None])[..., 0] / size

    def moved(at: Tensor, along: Tensor) -> Tensor:
        end = at.flatten(1).clone()
        end[:, free] += (vectors @ along[..., None])[..., 0]
        return end.view_as(at)

    slope, divisor = slopes(theta), values.abs() + damping[:, None]
    straight = moved(theta, slope / divisor)
    bent = moved(straight, slopes(straight) / divisor)
    kick = torch.zeros_like(slope)
    kick[:, 0] = KICK * torch.where(slope[:, 0] < 0, -1.0, 1.0)  # eigenvalues ascend
    kicked = moved(theta, kick)
    places = torch.stack([theta, straight, bent, kicked])
    heights = torch.stack([model.objective(at, sample) for at in places]).nan_to_num(-math.inf)
    if em:
        heights[2:] = -math.inf
    best = heights.argmax(0)
    expected = 0.5 * size[:, 0] * (slope**2 / values.abs().clamp(min=1e-14)).sum(-1)
    resting = (expected < TOLERANCE) & (heights[3] < heights[0] + TOLERANCE) | (best == 0) & (damping >= MOST_DAMPING)
    damping = (damping * torch.where(best > 0, 0.2, 5.0)).clamp(1e-12, MOST_DAMPING)
    return places[best, torch.arange(len(theta))], damping, resting


def lattice(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Points x and y, and the area each stands for, all (S): x is uniform on its values, y spaced by LATTICE."""
    deviation = math.sqrt(VARIANCE)
    values = torch.linspace(-1, 1, COVARIATES, dtype=torch.float64)
    means = model.truth[0, :, WEIGHT, None] * values + model.truth[0, :, INTERCEPT, None]
    low, high = means.min() - TAILS * deviation, means.max() + TAILS * deviation
    y = torch.arange(low.item(), high.item(), LATTICE * deviation, dtype=torch.float64)
    area = torch.full((COVARIATES * len(y),), LATTICE * deviation / COVARIATES, dtype=torch.float64)
    return values.repeat_interleave(len(y)), y.repeat(COVARIATES), area


def draw(model: Model, size: int, replications: int, generator: np.random.Generator) -> Sample:
    """`replications` samples of `size` points each."""
    x, y, area = lattice(model)
    probability = (area * model.log_density(model.truth, x, y)[0].exp()).numpy()
    counts = generator.multinomial(size, probability / probability.sum(), size=replications)
    return Sample(x, y, torch.from_numpy(counts).double())


def start(model: Model, experts: int, replications: int, generator: np.random.Generator) -> Tensor:
    """The truth with its first expert split into k - 1 of equal weight, these displaced at random, (R, k, 5)."""
    copies = experts - 1
    theta = torch.cat([model.truth[:, :1].expand(1, copies, -1), model.truth[:, 1:]], 1).repeat(replications, 1, 1)
    theta[:, :-1, BIAS] -= math.log(copies)
    noise = torch.from_numpy(generator.normal(size=(replications, copies, PARAMETERS)))
    theta[:, :-1] += noise * START_SPREAD
    theta[..., GATE] *= not model.competition
    return theta


def hellinger(model: Model, theta: Tensor) -> Tensor:
    """Hellinger distance of the fitted and the true joint density on the lattice, (R)."""
    x, y, area = lattice(model)
    roots = [(0.5 * model.log_density(parameters, x, y)).exp() for parameters in (theta, model.truth)]
    return (0.5 * area * (roots[0] - roots[1]) ** 2).sum(-1).sqrt()


@dataclass(frozen=True, slots=True)
class Matched:
    """Fitted experts matched to true ones.

    cells:         (R, k)     the true expert nearest in (a, b, v): the Voronoi cell
    sizes:         (R, k)     how many share it
    weights:       (R, k)     exp(beta0)
    displacements: (R, k, 4)  in beta1, a, b, v
    missed:        (R)        sum over true experts of | sum of weights in the cell - true weight |

    A softmax gate is known up to a shift of all beta0 and beta1. The theory's loss takes the infimum over shifts; here
    the cell of the last true expert is given its true weight and mean slope, which is one such shift. The theory's
    cells also look at beta1; these do not, so that they do not depend on the shift.
    """

    cells: Tensor
    sizes: Tensor
    weights: Tensor
    displacements: Tensor
    missed: Tensor


def match(theta: Tensor, truth: Tensor) -> Matched:
    """Fitted (R, k, 5) against true (1, k*, 5) parameters."""
    place, true_place = located(theta), located(truth)
    cells = (place[:, :, None] - true_place[:, None])[..., 1:].norm(dim=-1).argmin(-1)
    inside = torch.nn.functional.one_hot(cells, truth.shape[1]).to(theta.dtype)  # (R, k, k*)

    last = inside[..., -1]
    mass = (last * theta[..., BIAS].exp()).sum(-1, keepdim=True)
    empty = mass == 0
    shift = torch.where(empty, 1.0, mass / truth[:, -1:, BIAS].exp())
    weights = theta[..., BIAS].exp() / shift
    mean_slope = (last * weights * place[..., 0]).sum(-1, keepdim=True) / torch.where(empty, 1.0, mass / shift)
    place[..., 0] -= torch.where(empty, 0.0, mean_slope - true_place[:, -1:, 0])
    missed = ((inside * weights[..., None]).sum(1) - truth[..., BIAS].exp()).abs().sum(-1)
    sizes = inside.sum(1).gather(1, cells).long()
    return Matched(cells, sizes, weights, place - true_place[0, cells], missed)


def located(theta: Tensor) -> Tensor:
    """Where experts are: (beta1, a, b, v)."""
    place = theta[..., [GATE, WEIGHT, INTERCEPT, LOG_VARIANCE]]
    place[..., 3] = place[..., 3].exp()
    return place


def powers(size: int, *, competition: bool) -> tuple[float, ...]:
    """The Voronoi loss's powers of displacements in (beta1, a, b, v) in a cell of this many fitted experts.

    1 where an expert is alone. Shared cells: 2 under competition, and r, r/2, r, r/2 under softmax gating, where r is 4
    for two experts and 6 for three. For more it is not known: such a fit, astray, is given the powers of three.
    """
    if size == 1:
        return (1.0, 1.0, 1.0, 1.0)
    if competition:
        return (2.0, 2.0, 2.0, 2.0)
    order = KNOWN_ORDERS[min(size, 3)]
    return (order, order / 2, order, order / 2)


def voronoi_loss(matched: Matched, *, competition: bool) -> Tensor:
    """sum_j |sum_{i in cell j} exp(beta0_i) - exp(beta0*_j)| + sum_i exp(beta0_i) sum_d |displacement|^power, (R)."""
    largest = int(matched.sizes.max())
    table = torch.tensor([powers(size, competition=competition) for size in range(1, largest + 1)], dtype=torch.float64)
    terms = matched.displacements.abs() ** table[matched.sizes - 1]
    return matched.missed + (matched.weights * terms.sum(-1)).sum(-1)


def squared_errors(matched: Matched) -> Tensor:
    """Squared displacements in beta1, a, b, v, (R, 4): means by weight over experts that share a cell, or over all."""
    shared = matched.sizes > 1
    weights = matched.weights * torch.where(shared.any(-1, keepdim=True), shared, True)
    return (weights[..., None] * matched.displacements**2).sum(1) / weights.sum(1, keepdim=True)


QUANTITIES = (
    "Hellinger distance",
    "Voronoi loss",
    "Voronoi loss, powers 2",
    "gate slope beta1",
    "expert slope a",
    "expert intercept b",
    "variance v",
)


def guarantee(quantity: str, experts: int, *, competition: bool) -> str:
    """The theory's exponent of n, an upper bound up to logarithms."""
    order = KNOWN_ORDERS[experts - 1]  # all spare experts share one cell
    if quantity == "Voronoi loss, powers 2" and order > 1 and not competition:
        return "none"  # not the loss of its theorem
    if quantity in QUANTITIES[:3] or order == 1:
        return "−1/2"
    if competition:
        return "−1/4"
    return f"−1/{2 * order}" if quantity in ("gate slope beta1", "expert intercept b") else f"−1/{order}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model and k over all sizes n.

    values:  (n, R, 7)  QUANTITIES, those of parameters squared
    reached: (n, R)     fits that ended at a local optimum
    planned: (n, R)     fits whose spare experts all share the first true expert's cell
    walled:  (n, R)     fits with a parameter at the edge of the bounded set
    """

    values: np.ndarray
    reached: np.ndarray
    planned: np.ndarray
    walled: np.ndarray

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Errors by size, (n, 7): means over replications, root mean squares for parameters."""
        return np.concatenate([values[..., :3].mean(1), np.sqrt(values[..., 3:].mean(1))], -1)

    def slopes(self, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Least-squares slopes of log error in log n, (7), and their bootstrapped 95 % intervals, (2, 7)."""
        log_n = np.log(sizes) - np.log(sizes).mean()
        generator = np.random.default_rng(0)
        slope = lambda values: log_n @ np.log(self.levels(values)) / (log_n @ log_n)

        def resampled() -> np.ndarray:
            rows = generator.integers(self.values.shape[1], size=self.values.shape[:2])
            return np.take_along_axis(self.values, rows[..., None], 1)

        with np.errstate(divide="ignore", invalid="ignore"):  # competition has no beta1: its errors are zero
            draws = [slope(resampled()) for _ in range(BOOTSTRAP)]
            return slope(self.values), np.percentile(draws, [2.5, 97.5], axis=0)


def simulate(model: Model, experts: int, study: Study) -> Outcome:
    """All sizes and replications of one model and k."""
    rows = []
    for size in study.sizes:
        generator = np.random.default_rng([study.seed, model.competition, experts, size])
        sample = draw(model, size, study.replications, generator)
        theta, reached = likeliest(model, experts, sample, study, generator)
        matched = match(theta, model.truth)
        losses = [voronoi_loss(matched, competition=powers_2) for powers_2 in (model.competition, True)]
        values = torch.cat([torch.stack([hellinger(model, theta), *losses], 1), squared_errors(matched)], 1)
        walled = (beyond(theta) != 0).flatten(1).any(1)
        planned = (matched.cells[:, :-1] == 0).all(1)
        rows.append([column.numpy() for column in (values, reached, planned, walled)])
    return Outcome(*(np.stack(column) for column in zip(*rows, strict=True)))


def likeliest(
    model: Model, experts: int, sample: Sample, study: Study, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The best of the fits from several starting points, (R, k, 5), and whether it is a local optimum, (R)."""
    starts = [start(model, experts, study.replications, generator) for _ in range(study.starts)]
    fits = [fit(model, theta, sample, em_steps=study.em_steps, steps=study.steps) for theta in starts]
    best = torch.stack([model.objective(theta, sample) for theta, _ in fits]).argmax(0)
    rows = torch.arange(study.replications)
    return torch.stack([theta for theta, _ in fits])[best, rows], torch.stack([at for _, at in fits])[best, rows]


def table(outcomes: dict[tuple[Model, int], Outcome], study: Study) -> str:
    """Markdown: for each quantity and k and both models, slope [interval], theory's, errors at the first and last n."""
    slopes = {key: outcome.slopes(study.sizes) for key, outcome in outcomes.items()}
    models = (SOFTMAX, COMPETITION)
    lines = ["| | k | " + " | ".join(f"{model.name} | theory | errors" for model in models) + " |"]
    lines.append("|---|--:|" + "--:|--:|--:|" * len(models))
    for index, quantity in enumerate(QUANTITIES):
        for experts in study.experts:
            cells = [quantity, str(experts)]
            for model in models:
                if model.competition and quantity == "gate slope beta1":
                    cells += ["", "", ""]
                    continue
                slope, (low, high) = slopes[model, experts][0][index], slopes[model, experts][1][:, index]
                levels = outcomes[model, experts].levels(outcomes[model, experts].values)[:, index]
                cells.append(f"{slope:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−"))
                cells.append(guarantee(quantity, experts, competition=model.competition))
                cells.append(f"{levels[0]:.2g} to {levels[-1]:.2g}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(study: Study) -> None:
    """End with one line where the study cannot be made."""
    if not set(study.experts) <= {2, 3, 4}:
        raise SystemExit(f"--experts {study.experts}: the theory's powers are known for 2, 3 and 4 of them")
    if len(set(study.sizes)) < 2 or min(study.sizes) < 1:
        raise SystemExit(
            f"--sizes must be two or more different ones, each 1 or more, got {study.sizes}: slopes are of them"
        )
    for name in ("replications", "starts", "em_steps", "steps", "seed"):
        least = 0 if name in ("em_steps", "seed") else 1
        if getattr(study, name) < least:
            raise SystemExit(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(study, name)}")


def main(study: Study) -> None:
    """Both models, all k: the table, and what may have gone wrong."""
    check(study)
    began = time.perf_counter(), time.process_time()
    outcomes = {}
    for model in (SOFTMAX, COMPETITION):
        for experts in study.experts:
            outcomes[model, experts] = outcome = simulate(model, experts, study)
            unfinished, astray, edge = (~outcome.reached).sum(), (~outcome.planned).sum(), outcome.walled.sum()
            said = (
                f"of {outcome.reached.size} fits {unfinished} did not end, {astray} went astray, {edge} are at the edge"
            )
            print(f"{model.name}, k = {experts}: {said}; {time.perf_counter() - began[0]:.0f} s", flush=True)
    sizes = ", ".join(f"{size:,}" for size in study.sizes)
    print(f"\nSlopes of log error in log n over n = {sizes}; {study.replications} replications\n")
    print(table(outcomes, study), end="\n\n")
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"{wall:.0f} s, {processor:.0f} s of processor time, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
