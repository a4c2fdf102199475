"""Runs with hostile clients: their choice, their effect, and replays and resumptions to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, channels, fed
from tests.callbacks import StopAt
from tests.fed.problems import digits_population, linear_task

CLIENTS = 12
THOROUGH = pytest.mark.thorough


def config(**settings):
    small = {"rounds": 40, "cohort": 6, "perturbations": 5, "batch_size": 8, "eval_every": 40}
    return fed.SimulationConfig(**small | settings)


def run(algorithm, storage=None, task=None, **settings):
    population = digits_population(CLIENTS)
    return fed.Simulation(task or linear_task(), algorithm, population, config(**settings), storage=storage).run()


def build(name, rate=0.3, **options):
    return algorithms.load(name).build(rate, options)


def same(a, b):
    return fed.fingerprint(a.params) == fed.fingerprint(b.params)


@pytest.mark.thorough
def test_a_share_of_the_population_is_the_same_clients_in_every_round():
    """Exactly a quarter of the clients ever send forged messages: all their scalars are 1e6 times the others'."""
    algorithm = build("decomfl+scaled", 1e-9, guard=False, attack_scale=1e6)
    result = run(algorithm, attackers=0.25, rounds=30, eval_every=30)
    sizes = np.abs(result.records.scalars).max((2, 3))
    hostile = set(result.records.cohort[sizes > 1e3].tolist())
    honest = set(result.records.cohort[sizes <= 1e3].tolist())
    assert len(hostile) == 3
    assert not hostile & honest


@pytest.mark.thorough
def test_a_share_of_every_cohort():
    algorithm = build("decomfl+scaled", guard=False, attack_scale=0.0)
    result = run(algorithm, attackers=1 / 3, attackers_of="cohort", rounds=10)
    silent = (result.records.scalars == 0).all((2, 3))
    np.testing.assert_array_equal(silent.sum(1), 2)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["hiso", *(pytest.param(name, marks=THOROUGH) for name in ("decomfl", "mosaic"))])
def test_the_guard_keeps_one_hostile_client_of_a_cohort_from_deciding(name):
    """The guard works at any scale of the attack; without it the same run fails."""
    rate, settings = {"hiso": 0.1, "decomfl": 0.1, "mosaic": 0.6}[name], {"attackers": 1 / 6, "attackers_of": "cohort"}
    settings |= {"rounds": 120, "eval_every": 120, "perturbations": 16}
    # Mosaic's own clipping would do the guard's work.
    own = {"clipping": False, "scalar_bits": 4} if name == "mosaic" else {}

    def final(through, **options):
        attacked = "+" in through
        kept = settings if attacked else {k: v for k, v in settings.items() if "attackers" not in k}
        result = run(build(through, rate, **own, **options), **kept)
        return result.metrics[-1].metrics["accuracy"]

    alone = final(name)
    for scale in (10.0, 1e6):
        assert final(f"{name}+sign_flip", attack_scale=scale) > alone - 0.1
    assert final(f"{name}+sign_flip", attack_scale=1e6, guard=False) < alone - 0.3


@pytest.mark.thorough
def test_where_nobody_is_out_of_proportion_the_guard_changes_no_bit():
    uniform = fed.iid(len(linear_task().train["label"]), CLIENTS)

    def once(guard):
        algorithm = build("decomfl", guard=guard)
        return fed.Simulation(linear_task(), algorithm, uniform, config(batch_size=64, perturbations=16)).run()

    with_guard, without = once(True), once(False)
    assert with_guard.clipped == 0
    assert without.clipped is None
    assert same(with_guard, without)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "hiso+sign_flip+median",
        *(
            pytest.param(name, marks=THOROUGH)
            for name in ("decomfl+sign_flip", "hiso+gaussian_attack", "mosaic+colluding")
        ),
    ],
)
def test_modes_agree_replay_rebuilds_and_a_killed_run_goes_on(name, tmp_path):
    """Memory and forged messages depend neither on how a run is computed nor on where it was interrupted."""
    algorithm, hostile = build(name, 0.1), {"attackers": 1 / 3, "rounds": 24, "eval_every": 8}
    whole = run(algorithm, **hostile)
    assert whole.clipped is not None
    replayed, _ = fed.replay(whole.initial_params, algorithm, whole.records)
    assert fed.fingerprint(replayed) == fed.fingerprint(whole.params)
    assert same(whole, run(algorithm, directions="regenerate", **hostile))
    assert same(whole, run(algorithm, rounds_per_dispatch=5, **hostile))
    # The run stops after 16 rounds and resumes from a snapshot after 8: the caps come back from the ledger.
    first = fed.Storage(tmp_path / "run", snapshot_every=8)
    stopping = fed.Simulation(linear_task(), algorithm, digits_population(CLIENTS), config(**hostile), storage=first)
    stopping.callbacks = (StopAt(16),)
    assert stopping.run().interrupted
    again = fed.Storage(tmp_path / "run", snapshot_every=8, resume=True)
    gone_on = run(algorithm, storage=again, **hostile)
    assert same(whole, gone_on)
    assert gone_on.clipped == whole.clipped


@pytest.mark.thorough
def test_first_order_methods_are_attacked_and_defended_alike():
    settings = {"attackers": 1 / 3, "attackers_of": "cohort", "rounds": 30, "eval_every": 30}
    lost = run(build("fed_avg+sign_flip", 0.3, attack_scale=100.0), **settings)
    saved = run(build("fed_avg+multi_krum+sign_flip", 0.3, hostile=0.4, attack_scale=100.0), **settings)
    assert saved.metrics[-1].metrics["accuracy"] > lost.metrics[-1].metrics["accuracy"] + 0.2


@pytest.mark.thorough
def test_an_attacker_has_no_more_bits_than_the_others():
    """A sign flip by 10 arrives as one bit, like any sign."""
    result = run(build("sign+sign_flip", 0.01), attackers=0.25, rounds=5, eval_every=5, perturbations=1)
    assert set(np.unique(result.records.scalars)) <= {-1.0, 1.0}


@pytest.mark.thorough
def test_a_round_of_ones_own_takes_hostile_clients():
    algorithm = build("decomfl+scaled", 0.1, attack_scale=0.0)
    one = hiso_jax.make_round(
        lambda x, t: ((x - t) ** 2).sum(-1), algorithm, local_steps=1, num_perturbations=3, mu=1e-3
    )
    x, targets = jnp.zeros(8), jnp.ones((4, 1, 2, 8))
    memory = fed.first_memory(algorithm, jax.ShapeDtypeStruct((4, 1, 3), jnp.float32))
    state = algorithm.optimizer.init(x), memory
    hostile = jnp.array([True, False, False, False])
    aside = fed.Aside(hostile=hostile)
    _, _, record = one(x, state, targets, jnp.ones(4), jax.random.key(0), aside=aside)
    assert not np.any(record.scalars[0])
    assert np.all(record.scalars[1:])


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="attackers must be above 0 with an algorithm that is attacked"):
        run(build("decomfl"), attackers=0.2)
    with pytest.raises(ValueError, match="attackers must be above 0 with an algorithm that is attacked"):
        run(build("decomfl+scaled"))
    with pytest.raises(ValueError, match="groups must leave 3 clients along the same directions"):
        run(build("mosaic+median"))
    with pytest.raises(ValueError, match="weighting must be uniform"):
        run(build("decomfl+krum"), weighting="examples")
    with pytest.raises(ValueError, match="one attack at most"):
        algorithms.load("decomfl+scaled+sign_flip")
    assert channels.part_of("guard") == "rescale"


@pytest.mark.thorough
def test_a_forged_message_is_forged_once_whatever_the_honest_do_to_theirs():
    """Two sign channels do not flip a forged sign back, and the honest clients' noise is not added to a forgery."""
    flipped = run(build("sign+signs+sign_flip", 1e-6), attackers=0.34, attackers_of="cohort", rounds=4, eval_every=4)
    plain = run(build("sign+signs", 1e-6), rounds=4, eval_every=4)
    np.testing.assert_array_equal(flipped.records.scalars[0, :2], -plain.records.scalars[0, :2])
    np.testing.assert_array_equal(flipped.records.scalars[0, 2:], plain.records.scalars[0, 2:])
    silent = build("decomfl+local_noise+scaled", 1e-6, attack_scale=0.0, noise_multiplier=5.0)
    found = run(silent, attackers=0.34, attackers_of="cohort", rounds=4, eval_every=4).records.scalars
    assert not np.any(found[:, :2])
    assert np.all(found[:, 2:])


def test_attackers_who_are_nobody_are_refused():
    for of, whole in (("cohort", 6), ("population", 12)):
        with pytest.raises(ValueError, match=f"attackers must be a share of at least one of {whole} clients"):
            run(build("decomfl+scaled"), attackers=0.01, attackers_of=of)
