"""Diagnostics against closed forms on quadratics, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax.zo import diagnostics

SIZE = 30
pytestmark = pytest.mark.usefixtures("x64")


def quadratic(seed=0):
    """The function ½ xᵀAx + bᵀx, its A, and a point x."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    matrix = root @ root.T / SIZE - 0.3 * np.eye(SIZE)
    shift = rng.normal(size=SIZE)
    return (
        (lambda x: 0.5 * x @ jnp.asarray(matrix) @ x + jnp.asarray(shift) @ x),
        matrix,
        jnp.asarray(rng.normal(size=SIZE)),
    )


def test_the_exact_diagonal():
    loss, matrix, x = quadratic()
    found = diagnostics.hessian_diagonal(loss, x)
    np.testing.assert_allclose(found.value, np.diag(matrix), atol=1e-6)
    assert not np.any(found.standard_error)


def test_the_estimated_diagonal_is_within_its_standard_error():
    loss, matrix, x = quadratic()
    found = diagnostics.estimated_hessian_diagonal(loss, x, jax.random.key(0), samples=200)
    away = (found.value - np.diag(matrix)) / found.standard_error
    assert np.abs(away).max() < 4.5
    assert 0.6 < np.sqrt((away**2).mean()) < 1.5


@pytest.mark.thorough
def test_the_spectrum():
    loss, matrix, x = quadratic()
    found, wanted = diagnostics.spectrum(loss, x, jax.random.key(1), steps=SIZE), np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(found.eigenvalues[0], wanted, atol=1e-6)
    assert found.norm == pytest.approx(np.abs(wanted).max(), abs=1e-6)
    assert found.weights.sum() == pytest.approx(1)
    few = diagnostics.spectrum(loss, x, jax.random.key(1), steps=12)
    assert few.norm == pytest.approx(np.abs(wanted).max(), rel=1e-3)
    many = diagnostics.spectrum(loss, x, jax.random.key(1), steps=SIZE, starts=200)
    assert many.negative == pytest.approx((wanted < -1e-3 * found.norm).mean(), abs=0.03)


def test_ranks_and_ratios():
    loss, matrix, x = quadratic()
    diagonal, gradient = jnp.asarray(np.diag(matrix)), jax.grad(loss)(x)
    curvature = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, SIZE))
    inverse = np.diag(1 / np.asarray(curvature))
    norm = np.linalg.norm(matrix, 2)
    assert diagnostics.whitening_rank(diagonal, curvature) == pytest.approx(
        np.trace(np.sqrt(inverse) @ matrix @ np.sqrt(inverse)), abs=1e-6
    )
    # Where H is the Hessian's diagonal itself, ζ is d.
    assert diagnostics.whitening_rank(curvature, curvature) == pytest.approx(SIZE)
    assert diagnostics.effective_rank(diagonal, norm) == pytest.approx(np.trace(matrix) / norm, abs=1e-6)
    wanted = np.trace(matrix @ inverse) / (np.asarray(gradient) @ inverse @ np.asarray(gradient))
    signal = diagnostics.squared_gradient(gradient, gradient**2, curvature, 10, share=1.0)
    assert diagnostics.curvature_to_descent(diagonal, curvature, signal) == pytest.approx(wanted, abs=1e-6)


def test_rank_correlation_is_spearman_s_with_ties():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200).round(1)
    second = first + rng.normal(size=200)

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    wanted = np.corrcoef(ranks(first), ranks(second))[0, 1]
    assert diagnostics.rank_correlation(jnp.asarray(first), jnp.asarray(second)) == pytest.approx(wanted, abs=1e-12)
    assert diagnostics.rank_correlation(jnp.asarray(first), jnp.asarray(-first)) == pytest.approx(-1)
    assert np.isnan(diagnostics.rank_correlation(jnp.ones(5), jnp.arange(5.0)))
    shuffled = [
        diagnostics.shuffled_correlation(jnp.asarray(first), jnp.asarray(first), jax.random.key(i)) for i in range(40)
    ]
    assert abs(np.mean(shuffled)) < 3 / 200**0.5 / 40**0.5 + 1e-9
    assert np.std(shuffled) == pytest.approx(1 / 200**0.5, rel=0.4)


def test_the_fisher_s_diagonal():
    rng = np.random.default_rng(0)
    rows, x = rng.normal(size=(37, SIZE)), rng.normal(size=SIZE)

    def losses(x, batch):
        return 0.5 * (batch @ x) ** 2

    wanted = ((rows @ x)[:, None] ** 2 * rows**2).mean(0)
    for together in (1, 5, 64):
        found = diagnostics.fisher_diagonal(losses, jnp.asarray(x), jnp.asarray(rows), together=together)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_the_parts_of_the_scalars_variance():
    rng = np.random.default_rng(0)
    clients, batches, directions = 200, 3, 200
    signal = 2 * rng.normal(size=directions)
    scalars = (
        signal + 1.5 * rng.normal(size=(clients, 1, directions)) + 0.7 * rng.normal(size=(clients, batches, directions))
    )
    found = diagnostics.scalar_variance(jnp.asarray(scalars))
    assert found.signal == pytest.approx((signal**2).mean(), rel=0.03)
    assert found.between == pytest.approx(2.25, rel=0.03)
    assert found.within == pytest.approx(0.49, rel=0.03)
    assert found.noise == pytest.approx((2.25 + 0.49) / (signal**2).mean(), rel=0.05)
    with pytest.raises(ValueError, match="at least 2 clients and 2 batches"):
        diagnostics.scalar_variance(jnp.zeros((4, 1, 3)))


def test_advice_is_what_a_simulation_of_the_error_says():
    """The mean squared error of Δ is simulated by drawing Δ many times."""
    rng = np.random.default_rng(0)
    size, cohort, directions, noise = 400, 8, 2, 3.0
    gradient = rng.normal(size=size) / size**0.5
    deviation = (noise * (gradient**2).sum()) ** 0.5

    def error(own, times=400):
        total = 0.0
        for _ in range(times):
            made = np.zeros(size)
            for _ in range(cohort if own else 1):
                for _ in range(directions):
                    u = rng.normal(size=size)
                    seen = 1 if own else cohort
                    made += (u @ gradient + deviation * rng.normal(size=seen).mean()) * u
            total += ((made / directions / (cohort if own else 1) - gradient) ** 2).sum()
        return total / times

    variance = diagnostics.ScalarVariance((gradient**2).sum(), noise * (gradient**2).sum(), 0.0)
    found = diagnostics.advice(variance, cohort)
    assert found.share == pytest.approx(noise / cohort)
    assert error(False) / error(True) == pytest.approx(found.own, rel=0.1)
    assert "directions are the bottleneck" in found.words
    assert "data are the bottleneck" in diagnostics.advice(variance._replace(between=100.0), cohort).words
    assert diagnostics.advice(variance._replace(signal=0.0), cohort).own == 1.0


def test_the_squared_gradient_is_that_of_all_examples_and_not_of_a_sample():
    """The gradients' mean is small: a sample's squared mean is mostly noise, which the estimate subtracts."""
    rng = np.random.default_rng(0)
    gradients = 0.03 + rng.normal(size=(5000, SIZE))
    curvature = jnp.asarray(rng.uniform(0.5, 2, SIZE))
    wanted = float((gradients.mean(0) ** 2 / np.asarray(curvature)).sum())
    found, seen = [], []
    for _ in range(300):
        sample = gradients[rng.choice(5000, 200, replace=False)]
        mean, squares = jnp.asarray(sample.mean(0)), jnp.asarray((sample**2).mean(0))
        found.append(diagnostics.squared_gradient(mean, squares, curvature, 200, 200 / 5000))
        seen.append(float((mean**2 / curvature).sum()))
    assert np.mean(seen) > 3 * wanted
    assert np.mean(found) == pytest.approx(wanted, rel=0.35)


@pytest.mark.parametrize("values", [np.ones(40), np.repeat([1.0, 3.0], 20), np.eye(1, 40)[0] * 2, np.zeros(40)])
def test_a_spectrum_of_few_eigenvalues_ends_where_its_krylov_space_does(values):
    """Beyond it Lanczos' next vector is rounding noise; once, the identity had a reported norm of 246."""
    for dtype in (jnp.float32, jnp.float64):
        diagonal = jnp.asarray(values, dtype)
        found = diagnostics.spectrum(
            lambda x, diagonal=diagonal: 0.5 * (diagonal * x * x).sum(),
            jnp.ones(40, dtype),
            jax.random.key(0),
            steps=30,
        )
        assert found.norm == pytest.approx(np.abs(values).max(), abs=1e-4)
        assert found.negative == 0
        assert found.weights.sum() == pytest.approx(1)
        own = np.unique(np.round(np.asarray(found.eigenvalues)[np.asarray(found.weights) > 1e-6], 4))
        assert set(own) <= set(np.unique(values))


def test_a_spectrum_of_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="loss must have finite second derivatives at x"):
        diagnostics.spectrum(lambda x: (x**0.5).sum(), jnp.zeros(4), jax.random.key(0))
