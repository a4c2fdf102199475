"""Every scalar-only method, compared with an independent reading of its formulas and replayed to the bit.

A reading is an implementation of the paper's formulas in NumPy, in float64. From the library it takes only the raw
perturbations u.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax import algorithms, fed, zo
from hiso_jax.algorithms._matrices import AXES, basis_key
from hiso_jax.stacked import Stacked
from tests.fed.problems import assert_trees_identical, digits_population, linear_task
from tests.marks import slow, thorough

CLIENTS, ROUNDS, MU, RATE, D = 4, 6, 1e-3, 0.05, 7
SEED = jax.random.key(11)
A = np.random.default_rng(0).uniform(0.5, 3, (CLIENTS, D))
B = np.random.default_rng(1).normal(size=(CLIENTS, D))


def loss(params, batch):
    x = jnp.concatenate([params["v"], params["w"].reshape(-1)])
    return 0.5 * (batch["a"] * x**2).sum(-1) + jnp.sin((batch["b"] * x).sum(-1))


def f(i, x):
    return 0.5 * (A[i] * x**2).sum() + np.sin(B[i] @ x)


def of_library(algorithm, perturbations):
    """The parameters after every round."""
    params = {"v": jnp.linspace(-1, 1, 3), "w": jnp.linspace(0.5, 2, 4).reshape(2, 2)}
    run = jax.jit(fed.make_round(loss, algorithm, local_steps=1, num_perturbations=perturbations, mu=MU))
    state = algorithm.optimizer.init(params)
    batches = {"a": jnp.asarray(A)[:, None, None], "b": jnp.asarray(B)[:, None, None]}
    found = []
    for number in range(ROUNDS):
        params, state, _ = run(params, state, batches, jnp.ones(CLIENTS, bool), jax.random.fold_in(SEED, number))
        found.append(np.concatenate([np.asarray(params["v"]), np.asarray(params["w"]).reshape(-1)]))
    return np.stack(found)


def draw(number, index, sampler):
    like = {"v": jnp.zeros(3), "w": jnp.zeros((2, 2))}
    key = zo.perturbation_key(jax.random.fold_in(SEED, number), 0, index)
    z = zo.direction(key, like, sampler=sampler)
    return np.concatenate([np.asarray(z["v"]), np.asarray(z["w"]).reshape(-1)])


class Reading:
    """The state of a method: x and, where the method has them, H, moments and counts."""

    def __init__(self, perturbations, sampler="gaussian"):
        self.x = np.concatenate([np.linspace(-1, 1, 3), np.linspace(0.5, 2, 4)])
        self.h, self.m, self.v, self.t = np.ones(D), np.zeros(D), 0.0, 0
        self.perturbations, self.sampler = perturbations, sampler

    def measured(self, number, shape):
        """The raw perturbations, and the clients' mean scalars along each of them divided by ``shape``."""
        u = [draw(number, p, self.sampler) for p in range(self.perturbations)]
        x = self.x
        return u, [np.mean([(f(i, x + MU * z / shape) - f(i, x)) / MU for i in range(CLIENTS)]) for z in u]

    def trajectory(self, step):
        found = []
        for number in range(ROUNDS):
            step(self, number)
            found.append(self.x.copy())
        return np.stack(found)


def mean_of(g, u, shape=1.0):
    return sum(s * z / shape for s, z in zip(g, u, strict=True)) / len(g)


def hiso(r, number):
    u, g = r.measured(number, np.sqrt(r.h))
    d = mean_of(g, u, np.sqrt(r.h))
    r.x, r.h = r.x - RATE * d, 0.95 * r.h + 0.05 * (d**2 + 1e-8)


def hiso_by_direction(r, number):
    u, g = r.measured(number, np.sqrt(r.h))
    r.x = r.x - RATE * mean_of(g, u, np.sqrt(r.h))
    for s, z in zip(g, u, strict=True):
        r.h = 0.95 * r.h + 0.05 * ((s / len(g) * z / np.sqrt(r.h)) ** 2 + 1e-8)


def hiso_isotropic(r, number):
    u, g = r.measured(number, 1.0)
    d = mean_of(g, u, np.sqrt(r.h))
    r.x, r.h = r.x - RATE * d, 0.95 * r.h + 0.05 * (d**2 + 1e-8)


def hiso_one_number(r, number):
    u, g = r.measured(number, np.sqrt(r.h))
    d = mean_of(g, u, np.sqrt(r.h))
    r.x, r.h = r.x - RATE * d, 0.95 * r.h + 0.05 * ((d**2).mean() + 1e-8)


def hiso_frozen(r, number):
    before = r.h
    hiso(r, number)
    r.h = r.h if number < 3 else before


def decomfl(r, number):
    u, g = r.measured(number, 1.0)
    r.x = r.x - RATE * mean_of(g, u)


def sign(r, number):
    u = [draw(number, p, r.sampler) for p in range(r.perturbations)]
    votes = [np.sign(np.mean([np.sign(f(i, r.x + MU * z) - f(i, r.x)) for i in range(CLIENTS)])) for z in u]
    r.x = r.x - RATE * mean_of([v or 1.0 for v in votes], u)


def zo_adam(r, number):
    u, g = r.measured(number, 1.0)
    d, r.t = mean_of(g, u), r.t + 1
    r.m, r.v = 0.9 * r.m + 0.1 * d, 0.999 * r.v + 0.001 * d**2
    r.x = r.x - RATE * (r.m / (1 - 0.9**r.t)) / (np.sqrt(r.v / (1 - 0.999**r.t)) + 1e-8)


def r_adazo(r, number):
    u, g = r.measured(number, 1.0)
    r.m = 0.9 * r.m + 0.1 * mean_of(g, u)
    r.v = 0.999 * r.v + 0.001 * r.m**2
    r.x = r.x - RATE * r.m / (np.sqrt(r.v) + 1e-8)


def meazo(r, number):
    u, g = r.measured(number, 1.0)
    r.t, r.v = r.t + 1, 0.999 * r.v + 0.001 * np.mean(g) ** 2
    r.x = r.x - RATE / (np.sqrt(r.v / (1 - 0.999**r.t)) + 1e-8) * mean_of(g, u)


def fzoo(r, number):
    """The step from the losses themselves, as in the paper: (l_i − l_0) / (N std(l_1 … l_N))."""
    u = [draw(number, p, r.sampler) for p in range(r.perturbations)]
    losses = [np.mean([f(i, r.x + MU * z) for i in range(CLIENTS)]) for z in u]
    base = np.mean([f(i, r.x) for i in range(CLIENTS)])
    r.x = r.x - RATE * mean_of([(each - base) / np.std(losses) for each in losses], u)


def hizoo(r, number):
    total, slopes, u = np.zeros(D), [], [draw(number, p, r.sampler) for p in range(r.perturbations)]
    for raw in u:
        z = raw / np.sqrt(r.h)
        plus, minus, base = (np.mean([f(i, r.x + s * MU * z) for i in range(CLIENTS)]) for s in (1, -1, 0))
        slopes.append((plus - minus) / (2 * MU))
        total += abs(plus + minus - 2 * base) / (2 * MU**2) * r.h * raw**2 / len(u)
    r.h = (1 - 1e-3) * r.h + 1e-3 * total
    r.x = r.x - RATE * mean_of(slopes, u, np.sqrt(r.h))


def bszo(r, number):
    """The filter in matrix form, as in the authors' code."""
    u, g = r.measured(number, 1.0)
    count, scale = len(g), 1.5
    r.v = r.v or scale**2
    mean, spread = np.zeros(count), scale**2 * np.eye(count)
    for turn in range(count + 1):
        place = turn if turn < count else int(np.argmax(np.diag(spread)))
        axis = np.eye(count)[place]
        residual = g[place] - axis @ mean
        r.v = 0.9 * r.v + 0.1 * residual**2
        deviation = max(0.1 * scale, np.sqrt(r.v))
        gain = spread @ axis / (axis @ spread @ axis + deviation**2)
        mean, spread = mean + gain * residual, spread - np.outer(gain, axis @ spread)
    r.x = r.x - RATE * sum(m * z for m, z in zip(mean, u, strict=True))


def fed_kseed(r, number):
    """Every client's directions come from a pool of three."""
    key = jax.random.fold_in(SEED, number)
    like = {"v": jnp.zeros(3), "w": jnp.zeros((2, 2))}
    total = np.zeros(D)
    for i in range(CLIENTS):
        for p in range(r.perturbations):
            place = jax.random.randint(zo.perturbation_key(key, 0, i * r.perturbations + p), (), 0, 3)
            z = zo.direction(jax.random.fold_in(jax.random.key(0x5EED), place), like)
            z = np.concatenate([np.asarray(z["v"]), np.asarray(z["w"]).reshape(-1)])
            total += (f(i, r.x + MU * z) - f(i, r.x)) / MU * z / (CLIENTS * r.perturbations)
    r.x = r.x - RATE * total


def muon(r, number):
    """The matrix takes a Newton-Schulz step on Nesterov's momentum with bias correction; the vector takes NAdam's."""
    u, g = r.measured(number, 1.0)
    d, r.t = mean_of(g, u), r.t + 1
    r.m = 0.95 * r.m + 0.05 * d
    w = (0.95 * r.m / (1 - 0.95 ** (r.t + 1)) + 0.05 * d / (1 - 0.95**r.t))[3:].reshape(2, 2)
    w = w / (np.linalg.norm(w) + 1e-8)
    for _ in range(5):
        s = w @ w.T
        w = 3.4445 * w + (-4.775 * s + 2.0315 * s @ s) @ w
    a = r.adam = getattr(r, "adam", np.zeros((2, D)))
    a[0], a[1] = 0.9 * a[0] + 0.1 * d, 0.999 * a[1] + 0.001 * d**2
    slope = 0.9 * a[0] / (1 - 0.9 ** (r.t + 1)) + 0.1 * d / (1 - 0.9**r.t)
    v = slope / (np.sqrt(a[1] / (1 - 0.999**r.t)) + 1e-8)
    r.x = r.x - RATE * np.concatenate([v[:3], w.reshape(-1)])


def in_a_line(r, number):
    """A measurement along directions whose part in W lies on one line; every second round has a new line.

    Returns the line, the estimate along it, and the estimate for v.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0x5B5B), number // 2), 1)
    q, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (2, 1))))
    q = q * np.sign(q[0] * np.asarray(jax.random.normal(key, (2, 1)))[0])
    estimate, v = np.zeros((2, 1)), np.zeros(3)
    for p in range(r.perturbations):
        own = zo.perturbation_key(jax.random.fold_in(SEED, number), 0, p)
        b = np.asarray(jax.random.normal(jax.random.fold_in(own, 1), (2, 1)))
        u = np.asarray(jax.random.normal(jax.random.fold_in(own, 0), (3,)))
        z = np.concatenate([u, (b @ q.T).reshape(-1)])
        g = np.mean([(f(i, r.x + MU * z) - f(i, r.x)) / MU for i in range(CLIENTS)])
        estimate, v = estimate + g * b / r.perturbations, v + g * u / r.perturbations
    return q, estimate, v


def zo_muon(r, number):
    """A step by five Newton-Schulz iterations on the estimate in the subspace."""
    q, estimate, v = in_a_line(r, number)
    x = estimate / (np.linalg.norm(estimate) + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    r.x = r.x - RATE * np.concatenate([0.5 * v, (x @ q.T).reshape(-1)])


def zo_mopi(r, number):
    """A step in the subspace, as in the paper; M and the axis are reset with every new subspace."""
    q, estimate, v = in_a_line(r, number)
    if number % 2 == 0:
        start = np.asarray(jax.random.normal(jax.random.fold_in(basis_key(AXES), 1), (2, 1)))
        r.subspace, r.axis, r.mean = estimate, start, v
    else:
        r.subspace, r.mean = 0.75 * r.subspace + 0.25 * estimate, 0.75 * r.mean + 0.25 * v
    r.axis, _ = np.linalg.qr(r.subspace @ (r.subspace.T @ r.axis))
    u = r.subspace.T @ r.axis
    w = r.axis @ (u / np.linalg.norm(u, axis=0)).T @ q.T
    r.x = r.x - RATE * np.concatenate([0.5 * r.mean, w.reshape(-1)])


def adamezo(r, number):
    """MeZO for the first three rounds, then steps from the estimates of the last three rounds."""
    (u,), (g,) = r.measured(number, 1.0)
    r.past = [g * u, *getattr(r, "past", [])][:3]
    num = sum(0.7**age * d for age, d in enumerate(r.past))
    den = sum(0.9**age * d**2 for age, d in enumerate(r.past))
    r.x = r.x - RATE * (g * u if number < 3 else 100 * num / (np.sqrt(den) + 1e-5))


def zo_align(r, number):
    """The shortest vector with the measured directional derivatives, by a least-squares solver."""
    u, g = r.measured(number, 1.0)
    r.x = r.x - RATE * np.linalg.lstsq(np.stack(u), np.array(g), rcond=None)[0]


def projected(r, number):
    """Every client's gradient, projected on directions of its own."""
    delta = np.zeros(D)
    for i in range(CLIENTS):
        gradient = A[i] * r.x + np.cos(B[i] @ r.x) * B[i]
        for p in range(r.perturbations):
            z = draw(number, i * r.perturbations + p, r.sampler)
            delta += gradient @ z * z / (CLIENTS * r.perturbations)
    r.x = r.x - RATE * delta


def ferret(r, number):
    """Every client's gradient, projected on directions of one leaf each.

    A leaf is drawn in proportion to the norm of its progress.
    """
    leaf_of, squares, delta = np.repeat([0, 1], [3, 4]), getattr(r, "squares", np.zeros(2)), np.zeros(D)
    norms = np.sqrt(squares)
    weights = np.maximum(np.floor(2**16 * norms / 2.0 ** np.frexp(norms.max())[1]), 2**12)
    for i in range(CLIENTS):
        gradient = A[i] * r.x + np.cos(B[i] @ r.x) * B[i]
        for p in range(r.perturbations):
            index = i * r.perturbations + p
            key = zo.perturbation_key(jax.random.fold_in(SEED, number), 0, index)
            drawn = int(jax.random.randint(jax.random.fold_in(key, 0xB10C0002), (), 0, int(weights.sum()), np.int32))
            leaf = int(drawn >= weights[0])
            z = np.where(leaf_of == leaf, draw(number, index, r.sampler), 0) * np.sqrt(weights.sum() / weights[leaf])
            delta += gradient @ z * z / (CLIENTS * r.perturbations)
    r.x = r.x - RATE * delta
    new = np.array([(delta[leaf_of == leaf] ** 2).mean() for leaf in (0, 1)]) * weights / weights.sum()
    r.squares = 0.9 * squares + 0.1 * new


READINGS = {
    "ferret": (ferret, {}, 3, "uniform"),
    "fed_mpdd": (projected, {}, 3, "rademacher"),
    "fed_scalar": (projected, {}, 1, "rademacher"),
    "adamezo": (adamezo, {"window": 3}, 1, "gaussian"),
    "bszo": (bszo, {"prior": 1.5}, 2, "gaussian"),
    "fed_kseed": (fed_kseed, {"pool_seeds": 3}, 2, "gaussian"),
    "hiso": (hiso, {}, 3, "gaussian"),
    "hiso_by_direction": (hiso_by_direction, {}, 3, "gaussian"),
    "hiso_isotropic": (hiso_isotropic, {}, 3, "gaussian"),
    "hiso_one_number": (hiso_one_number, {}, 3, "gaussian"),
    "hiso_frozen": (hiso_frozen, {"learning_rounds": 3}, 3, "gaussian"),
    "decomfl": (decomfl, {}, 3, "gaussian"),
    "sign": (sign, {}, 1, "gaussian"),
    "zo_adam": (zo_adam, {}, 2, "gaussian"),
    "r_adazo": (r_adazo, {}, 2, "gaussian"),
    "meazo": (meazo, {}, 2, "gaussian"),
    "muon": (muon, {}, 2, "gaussian"),
    "fzoo": (fzoo, {}, 4, "rademacher"),
    "hizoo": (hizoo, {}, 2, "gaussian"),
    "zo_align": (zo_align, {}, 4, "gaussian"),
    "zo_mopi": (
        zo_mopi,
        {"rank": 1, "hold_rounds": 2, "vector_share": 0.5, "beta": 0.75, "components": 1},
        3,
        "gaussian",
    ),
    "zo_muon": (zo_muon, {"rank": 1, "hold_rounds": 2, "vector_share": 0.5}, 3, "gaussian"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", READINGS)
def test_a_method_is_what_its_paper_says(name):
    step, options, perturbations, sampler = READINGS[name]
    expected = Reading(perturbations, sampler).trajectory(step)
    found = of_library(getattr(algorithms, name)(RATE, **options), perturbations)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(np.diff(expected, axis=0)).max() > 1e-4


OWN = ("fed_kseed", "fed_mpdd", "fed_scalar", "ferret", "just_one_byte", "local_mosaic")
NEW = (
    "adamezo",
    "bszo",
    *OWN,
    "fzoo",
    "hiso_by_direction",
    "hiso_frozen",
    "hiso_isotropic",
    "hiso_one_number",
    "hizoo",
    "meazo",
    "muon",
    "r_adazo",
    "zo_align",
    "zo_mopi",
    "zo_muon",
)


# The other methods take as long again; CI replays them.
QUICK = ("fed_kseed", "fzoo", "hizoo", "zo_align")


@pytest.mark.parametrize("name", [name if name in QUICK else thorough(name) for name in NEW])
@pytest.mark.parametrize("directions", ["keep", slow("regenerate")])
def test_a_method_is_replayed_to_the_bit(name, directions):
    method = getattr(algorithms, name)(0.02)
    kept = None if name in OWN else directions
    config = fed.SimulationConfig(
        rounds=8,
        cohort=4,
        perturbations=1 if name == "adamezo" else 3,
        batch_size=8,
        eval_every=8,
        directions=kept,
        local_learning_rate=0.02,
        rounds_per_dispatch=4,
    )
    result = fed.Simulation(linear_task(), method, digits_population(), config).run()
    assert result.diverged_at is None
    rebuilt = fed.replay(result.initial_params, method, result.records)
    assert_trees_identical((result.params, result.state), rebuilt)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["muon", "zo_muon"])
def test_matrices_of_scanned_layers_are_those_of_the_layers(name):
    tx = getattr(algorithms, name)(0.02).optimizer
    layers = jax.random.normal(jax.random.key(5), (3, 4, 5))
    many, apart = {"layers": Stacked({"w": layers})}, {"layers": [{"w": layer} for layer in layers]}
    scalars = jnp.ones((1, 3))
    step, listed = (tx.update(scalars, tx.init(params), params, key=SEED, clients=1)[0] for params in (many, apart))
    for one, other in zip(step["layers"].unstacked(), listed["layers"], strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-4, atol=1e-6)


def test_no_more_directions_are_aligned_than_there_are_parameters():
    with pytest.raises(ValueError, match="perturbations must be at most 7 in all groups, the parameters; got 8"):
        of_library(algorithms.zo_align(RATE), 8)


def test_one_loss_has_no_standard_deviation():
    with pytest.raises(ValueError, match="perturbations must be at least 2 for this method, got 1"):
        fed.make_round(loss, algorithms.fzoo(0.1), local_steps=1, num_perturbations=1, mu=MU)
