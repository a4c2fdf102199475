"""Wrong data are refused before a run, and problems in a run are reported while it goes on."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, zo
from tests.fed.problems import digits_population, linear_task
from tests.marks import slow

ROWS = np.zeros((4, 3), np.float32)


@dataclasses.dataclass(frozen=True)
class Bare:
    """A user's own task, with the given data and the given loss."""

    train: object
    test: object = dataclasses.field(default_factory=lambda: {"x": ROWS})
    of: object = staticmethod(lambda params, batch: (batch["x"] @ params["w"]) ** 2)

    def init(self, key):
        return {"w": jnp.ones(3)}

    def loss(self, params, batch):
        return self.of(params, batch)

    def metrics(self, params, batch):
        return {"loss": self.loss(params, batch)}


def with_one(value, dtype=np.float32):
    rows = np.zeros((4, 3), dtype)
    rows[2, 1] = value
    return {"x": rows}


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (Bare(with_one(np.nan)), r"train\['x'\] must hold finite numbers only; example 2 has one that is not"),
        (Bare(with_one(np.inf, np.float64)), "example 2 has one that is not"),
        (Bare({"x": ROWS}, test=with_one(-np.inf)), r"test\['x'\] must hold finite numbers only"),
        (Bare({"x": ROWS, "y": np.zeros(3)}), r"as many entries .* train\['x'\] 4, train\['y'\] 3"),
        (Bare({"x": np.array(["a", "b"])}), r"train\['x'\] must hold numbers, .*'a'.* numpy.unique"),
        (Bare({"x": [[1.0, 2.0]]}), r"train\['x'\]\[0\]\[0\] must be an array of examples, got a float"),
        (Bare({}), "train must hold examples, and is empty"),
        (Bare({"x": ROWS[:0]}), "train must hold at least one example"),
        (Bare({"x": ROWS}, of=lambda params, batch: jnp.mean(batch["x"] @ params["w"])), r"do not take its mean"),
        (Bare({"x": ROWS}, of=lambda params, batch: (batch["x"] @ params["w"], {})), "got a tuple"),
        (Bare({"x": ROWS}, of=lambda params, batch: batch["x"]), r"of shape \(2,\) for 2 examples; got \(2, 3\)"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(task, sentence):
    config = fed.SimulationConfig(rounds=1, cohort=1)
    with pytest.raises(ValueError, match=sentence) as caught:
        fed.Simulation(task, hiso_jax.hiso(0.1), fed.iid(4, 2), config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=sentence):
        fed.sweep(task, hiso_jax.hiso, [fed.iid(4, 2)], config, fed.Grid([0.1]))


def test_a_dataset_of_the_hub_is_no_pytree_of_arrays():
    import datasets

    rows = datasets.Dataset.from_list([{"x": 1.0}])
    with pytest.raises(
        ValueError, match="train must be an array of examples, got a datasets Dataset: make it a pytree"
    ):
        fed.check_task(Bare(rows))


@pytest.mark.thorough
def test_reports_that_are_left_out_are_told(caplog):
    """Example 5 has a loss that is not a number, and its client's reports are not counted."""
    whole = linear_task()
    position = np.arange(len(whole.train["label"]), dtype=np.float32)

    def apply(params, inputs):
        images, number = inputs[:, :-1], inputs[:, -1]
        logits = whole.model_apply(params, images)
        return jnp.where(number[:, None] == 5, jnp.nan, logits)

    def numbered(split, numbers):
        return {"input": np.c_[split["input"].reshape(len(split["label"]), -1), numbers], "label": split["label"]}

    task = dataclasses.replace(
        whole,
        model_apply=apply,
        train=numbered(whole.train, position),
        test=numbered(whole.test, -np.ones(len(whole.test["label"]), np.float32)),
    )
    population = digits_population()
    owner = int(np.searchsorted(population.offsets, np.flatnonzero(population.indices == 5)[0], "right")) - 1
    config = fed.SimulationConfig(rounds=30, cohort=4, batch_size=64, eval_every=10)
    with caplog.at_level(logging.WARNING, "hiso_jax"):
        result = fed.Simulation(task, hiso_jax.hiso(0.02), population, config).run()
    invalid = (result.records.attendance == fed.population.REPORTED) & ~result.records.valid
    assert result.invalid == invalid.sum() > 0
    (sentence,) = result.health_warnings
    first = result.records.round[np.argwhere(invalid)[0][0]]
    assert f"{invalid.sum()} of 120 reports held a number that is not finite and were left out" in sentence
    assert f"client {owner}'s in round {first} first" in sentence
    # The warning comes when the problem is first seen, and at most once between two evaluations.
    assert 1 <= len(caplog.messages) <= 3


@pytest.mark.thorough
@pytest.mark.parametrize("method", [hiso_jax.hiso(1e-3), slow(hiso_jax.mosaic(1e-3))])
def test_a_mu_that_rounding_eats_is_told(method, caplog):
    def run(mu):
        config = fed.SimulationConfig(rounds=12, cohort=4, batch_size=8, eval_every=12, mu=mu, perturbations=4)
        return fed.Simulation(linear_task(), method, digits_population(), config).run().health_warnings

    assert run(1e-3) == ()
    with caplog.at_level(logging.WARNING, "hiso_jax"):
        (sentence,) = run(1e-9)
    assert sentence.startswith("mu is too small for losses in float32: at 1e-09, ")
    assert "0.002 suits a loss of 2." in sentence
    assert caplog.messages == [sentence]


def test_a_suggested_mu_sees_the_gradient():
    """On a quadratic with tr ∇²f = 1, which the suggestion assumes, both errors are small beside the scalar."""
    import jax

    dimension = 1000
    params = jnp.ones(dimension)

    def loss(x, batch):
        return 1 + jnp.sum(x**2) / (2 * dimension)

    mu = zo.suggested_mu(float(loss(params, None)), jnp.float32, dimension)
    key = jax.random.key(0)
    _, measured = zo.scalars(loss, params, None, key, num_perturbations=200, mu=mu)
    exact = [float(zo.direction(zo.perturbation_key(key, 0, p), params).sum() / dimension) for p in range(200)]
    error = np.abs(np.asarray(measured) - exact)
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.sqrt(np.mean(np.square(exact)))


class Loose(Bare):
    """The same task, as a class whose members are replaced one by one."""


@pytest.mark.parametrize(
    ("member", "value", "said"),
    [
        ("metrics", lambda self, params, batch: {"loss": self.loss(params, batch).mean()}, r"has \(\): do not take"),
        ("metrics", lambda self, params, batch: {"loss": jnp.ones(3)}, r"loss has \(3,\)"),
        ("metrics", lambda self, params, batch: self.loss(params, batch), "metrics must return numbers by name"),
        ("metrics", {"loss": 1.0}, "metrics of a task must be a function, got a dict"),
        ("summarise", lambda self, outputs: 3.0, "summarise must return one number for each name"),
        ("summarise", lambda self, outputs: {"loss": outputs["loss"]}, "summarise must return one number for each"),
        ("target", "0.9", "target of a task must be a number or None, got '0.9'"),
        ("metric", 1, "metric of a task must be the name of one of its metrics or None, got 1"),
        ("metric", "acuracy", "metric must be one of the task's metrics, loss; got acuracy"),
        ("hold_out", 5, "hold_out of a task must be a function, got a int"),
        ("init", lambda self, key: {"w": jnp.full(3, jnp.nan)}, r"\['w'\] hold a number that is not"),
    ],
)  # fmt: skip
def test_every_member_of_a_task_is_checked(member, value, said):
    task = type("Own", (Loose,), {member: value})({"x": ROWS})
    config = fed.SimulationConfig(rounds=1, cohort=2, eval_every=1, batch_size=2)
    with pytest.raises(ValueError, match=said):
        fed.Simulation(task, hiso_jax.hiso(0.01), fed.iid(4, 2), config).run()


def test_a_task_that_lacks_a_member_is_told_which():
    class Half:
        def __init__(self):
            self.train = self.test = {"x": ROWS}

        def init(self, key):
            return {"w": jnp.ones(3)}

    config = fed.SimulationConfig(rounds=1, cohort=2)
    with pytest.raises(ValueError, match=r"task must have init, loss, metrics, train and test, .*; it lacks loss"):
        fed.Simulation(Half(), hiso_jax.hiso(0.01), fed.iid(4, 2), config)


def test_keys_whose_order_does_not_matter_are_refused():
    key = jax.random.key(0, impl="unsafe_rbg")
    with pytest.raises(ValueError, match="must be threefry2x32 or rbg, not unsafe_rbg"):
        zo.perturbation_key(key, 0, 1)
    with jax.default_prng_impl("unsafe_rbg"), pytest.raises(ValueError, match="not unsafe_rbg"):
        fed.check_task(Bare({"x": ROWS}))
    assert zo.perturbation_key(jax.random.key(0, impl="rbg"), 0, 1).shape == ()
