"""Private runs: the accountant, the noise, the secret, and the information that they reveal."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed
from hiso_jax.fed import privacy
from hiso_jax.fed.ledger import LEDGER
from hiso_jax.fed.privacy import Sampling
from hiso_jax.fed.run import sensitivity
from tests.callbacks import StopAt
from tests.fed.problems import digits_population, linear_task

CLIENTS = 12


def config(**settings):
    small = {"rounds": 12, "cohort": 6, "perturbations": 5, "batch_size": 8, "eval_every": 6}
    return fed.SimulationConfig(**small | settings)


def run(algorithm, storage=None, **settings):
    population = digits_population(CLIENTS)
    return fed.Simulation(linear_task(), algorithm, population, config(**settings), storage=storage).run()


def build(name="decomfl+private_mean", rate=0.1, **options):
    return algorithms.load(name).build(rate, options)


# ---------------------------------------------------------------- the accountant


def test_epsilon_is_that_of_the_right_event_and_sensitivity():
    """The case is σ = 2S, N = 100, C = 10, T = 100, δ = 1e-5; a replaced client moves the sum by 2S."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    def independent(event):
        accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        return accountant.compose(event).get_epsilon(1e-5)

    secret = privacy.epsilon(2.0, Sampling(100, 10, 100))
    assert secret == pytest.approx(14.05, abs=0.005)
    once = dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.0))
    assert secret == independent(dp.SelfComposedDpEvent(once, 100))
    known = privacy.epsilon(2.0, Sampling(100, 10, 100, visits=10))
    assert known == pytest.approx(19.05, abs=0.005)
    assert known == independent(dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 10))


def test_the_noise_for_a_budget_meets_it_and_hardly_more():
    for sampling in (Sampling(100, 10, 100), Sampling(100, 10, 100, 12), Sampling(20, 20, 5)):
        noise = privacy.noise_for(3.0, sampling)
        assert 2.98 < privacy.epsilon(noise, sampling) <= 3.0


@pytest.mark.parametrize(("clients", "cohort", "noise"), [(10, 9, 2.0), (10, 5, 1.0), (50, 20, 1.0), (100, 1, 0.5)])
def test_secrecy_costs_no_privacy(clients, cohort, noise):
    """Cohorts with every client in every round bound the information that secret cohorts reveal, too."""
    secret, every = Sampling(clients, cohort, 20), Sampling(clients, cohort, 20, visits=20)
    assert privacy.epsilon(noise, secret) <= privacy.epsilon(noise, every)


@pytest.mark.thorough
def test_nor_does_it_cost_noise():
    for clients, cohort in ((10, 9), (50, 5)):
        secret, every = Sampling(clients, cohort, 20), Sampling(clients, cohort, 20, visits=20)
        assert privacy.noise_for(4.0, secret) <= privacy.noise_for(4.0, every) * (1 + 1e-3)
        assert privacy.epsilon(privacy.noise_for(4.0, secret), secret) <= 4.0


def test_the_ends_of_the_scale():
    assert privacy.epsilon(0.0, Sampling(10, 2, 5)) == float("inf")
    assert privacy.epsilon(1.0, Sampling(10, 2, 0)) == 0
    assert privacy.epsilon(1.0, Sampling(10, 2, 5, 0)) == 0
    with pytest.raises(ValueError, match="delta must be below 1"):
        privacy.epsilon(1.0, Sampling(10, 2, 5), delta=1.5)
    with pytest.raises(ValueError, match="cohort must be"):
        privacy.epsilon(1.0, Sampling(10, 20, 5))


@pytest.mark.thorough
def test_visits_are_counted_over_the_cohorts_that_come():
    result = run(hiso_jax.decomfl(0.1), rounds=12)
    wanted = np.bincount(result.records.cohort.reshape(-1)).max()
    assert privacy.most_visits(jax.random.key(0), CLIENTS, 6, 12) == wanted


# ---------------------------------------------------------------- the mechanism


def one_round(algorithm, targets, mask, secret=7):
    round_of = hiso_jax.make_round(
        lambda x, t: ((x - t) ** 2).sum(-1), algorithm, local_steps=1, num_perturbations=5, mu=1e-3
    )
    x = jnp.zeros(targets.shape[-1])
    aside = fed.Aside(secret=jax.random.key(secret))
    return jax.jit(round_of)(x, algorithm.optimizer.init(x), targets, mask, jax.random.key(0), aside=aside)


def test_the_denominator_is_the_whole_cohort_and_an_invalid_client_counts_as_zero():
    algorithm = build(clip_norm=2.0, noise_multiplier=0.0)
    targets = jnp.array(np.random.default_rng(0).normal(size=(6, 1, 2, 8)), jnp.float32).at[1].set(jnp.nan)
    mask = jnp.array([True, True, True, True, False, True])
    _, _, record = one_round(algorithm, targets, mask)
    np.testing.assert_array_equal(record.valid, [True, False, True, True, False, True])
    counted = np.asarray(record.scalars)[np.asarray(record.valid)]
    sizes = np.linalg.norm(counted.reshape(4, -1), axis=1)
    clipped = counted * np.minimum(1, 2.0 / sizes)[:, None, None]
    np.testing.assert_allclose(record.aggregate, clipped.sum(0) / 6, rtol=1e-5)
    assert record.clipped == (sizes > 2.0).sum()


@pytest.mark.thorough
@pytest.mark.parametrize("groups", [1, 3])
def test_noise_has_the_variance_that_was_promised(groups):
    """The noise is σS on the sum, so σS/C on the mean; with G groups every group's sum has it, and counts G times."""
    algorithm = build(clip_norm=0.5, noise_multiplier=3.0, direction_groups=groups)
    targets = jnp.full((6, 1, 2, 8), jnp.nan)
    made = [one_round(algorithm, targets, jnp.ones(6, bool), secret)[2] for secret in range(150)]
    noise = np.stack([record.aggregate for record in made])
    assert noise.shape == (150, 1, 5 * groups)
    assert noise.std() == pytest.approx(groups * 3.0 * 0.5 / 6, rel=0.06)
    assert abs(noise.mean()) < 4 * noise.std() / noise.size**0.5
    # The aggregate is applied even if no client counts, so that this is not revealed.
    assert all(bool(record.applied) for record in made)


def test_local_noise_is_each_client_s_own():
    algorithm = build("decomfl+local_noise", clip_norm=0.5, noise_multiplier=2.0, guard=False)
    targets = jnp.zeros((200, 1, 2, 8))
    _, _, record = one_round(algorithm, targets, jnp.ones(200, bool))
    sent = np.asarray(record.scalars).reshape(200, -1)
    assert sent.std() == pytest.approx(1.0, rel=0.1)
    assert np.abs(np.corrcoef(sent.T) - np.eye(5)).max() < 0.3


@pytest.mark.thorough
def test_what_is_forged_from_noised_messages_tells_no_more_than_they_do():
    """Hostile clients know the noised messages of the others, and not the messages before the noise."""
    algorithm = build("decomfl+local_noise+inner_product", clip_norm=0.5, noise_multiplier=2.0, guard=False)
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1, 2, 8)), jnp.float32)
    hostile = jnp.arange(8) < 2
    round_of = hiso_jax.make_round(
        lambda x, t: ((x - t) ** 2).sum(-1), algorithm, local_steps=1, num_perturbations=5, mu=1e-3
    )
    aside = fed.Aside(secret=jax.random.key(7), hostile=hostile)
    x = jnp.zeros(8)
    record = round_of(x, algorithm.optimizer.init(x), targets, jnp.ones(8, bool), jax.random.key(0), aside=aside)[2]
    sent = np.asarray(record.scalars)[:, 0]
    np.testing.assert_allclose(sent[:2], np.broadcast_to(-10 * sent[2:].mean(0), (2, 5)), rtol=1e-4)


def test_forged_messages_count_among_what_a_client_moves():
    def of(name, **settings):
        algorithm = algorithms.load(name).build(0.1, {})
        return sensitivity(algorithm, config(attackers=0.2, **settings), 100)

    # A client moves its own message and those forged from it: by two of ten clients, or by up to nine of a cohort.
    assert of("decomfl+private_mean+colluding", cohort=10, attackers_of="cohort") == 3
    assert of("decomfl+private_mean+colluding", cohort=10) == 10
    assert of("decomfl+private_mean+sign_flip", cohort=10) == 1
    assert of("decomfl+local_noise+colluding", cohort=10) == 1


@pytest.mark.thorough
def test_the_noise_is_not_made_of_what_everyone_knows():
    """Two rounds with one seed and two secrets differ; without a secret a round is refused."""
    algorithm = build(noise_multiplier=1.0)
    targets = jnp.ones((6, 1, 2, 8))
    first, second = (one_round(algorithm, targets, jnp.ones(6, bool), secret)[2].aggregate for secret in (1, 2))
    assert np.abs(first - second).max() > 0.01
    with pytest.raises(ValueError, match="secret must be given"):
        hiso_jax.make_round(
            lambda x, t: ((x - t) ** 2).sum(-1), algorithm, local_steps=1, num_perturbations=5, mu=1e-3
        )(jnp.zeros(8), algorithm.optimizer.init(jnp.zeros(8)), targets, jnp.ones(6, bool), jax.random.key(0))


# ---------------------------------------------------------------- runs


@pytest.mark.thorough
def test_a_private_run_replays_goes_on_and_keeps_its_secret(tmp_path):
    algorithm = build(noise_multiplier=0.3)
    folder = tmp_path / "run"
    stopping = fed.Simulation(
        linear_task(), algorithm, digits_population(CLIENTS), config(), storage=fed.Storage(folder, snapshot_every=0)
    )
    stopping.callbacks = (StopAt(6),)
    before = stopping.run()
    assert before.interrupted
    secret = (folder / "server.secret").read_text().strip()
    assert stat.S_IMODE(os.stat(folder / "server.secret").st_mode) == 0o600
    result = run(algorithm, storage=fed.Storage(folder, resume=True))
    # Cohorts and noise continue from the same secret: an uninterrupted run with it is the same to the bit.
    fresh = tmp_path / "again"
    fresh.mkdir()
    (fresh / "server.secret").write_text(secret + "\n")
    again = run(algorithm, storage=fed.Storage(fresh))
    assert fed.fingerprint(again.params) == fed.fingerprint(result.params)
    np.testing.assert_array_equal(again.records.cohort, result.records.cohort)
    replayed, _ = fed.replay(result.initial_params, algorithm, result.records)
    assert fed.fingerprint(replayed) == fed.fingerprint(result.params)
    assert result.privacy.epsilon == privacy.epsilon(0.3, Sampling(CLIENTS, 6, 12))
    # Neither the ledger nor the delta contains the secret.
    ledger = fed.load(folder)
    fed.save_delta(fed.delta_of(ledger), tmp_path / "delta.safetensors")
    raw = bytes.fromhex(secret)
    words = np.frombuffer(raw, ">u4").astype("<u4").tobytes()
    for path in (folder / LEDGER, tmp_path / "delta.safetensors"):
        content = path.read_bytes()
        assert not any(form in content for form in (secret.encode(), raw, raw[::-1], words))
    # The delta contains no client's row, loss or validity either.
    given = fed.load_delta(tmp_path / "delta.safetensors")
    held = {name for name, value in given.updates._asdict().items() if value is not None}
    assert held == {"seed_key", "round", "aggregate", "applied", "clients"}
    assert given.updates.applied.all()
    assert "loss" not in json.dumps(given.header["config"])


@pytest.mark.thorough
def test_cohorts_are_secret_unless_they_are_asked_to_be_public():
    private = run(build(noise_multiplier=0.3))
    other = run(build(noise_multiplier=0.3))
    public = run(build(noise_multiplier=0.3), public_cohorts=True)
    plain = run(build("decomfl"))
    assert (private.records.cohort != other.records.cohort).any()
    np.testing.assert_array_equal(public.records.cohort, plain.records.cohort)
    visits = np.bincount(plain.records.cohort.reshape(-1)).max()
    assert private.privacy.visits is None
    assert public.privacy.visits == visits
    assert public.privacy.epsilon == privacy.epsilon(0.3, Sampling(CLIENTS, 6, 12, int(visits)))
    local = run(build("decomfl+local_noise", noise_multiplier=3.0))
    assert local.privacy.local
    np.testing.assert_array_equal(local.records.cohort, plain.records.cohort)


@pytest.mark.thorough
def test_mosaic_shares_its_directions_where_the_server_noises():
    algorithm = build("mosaic+private_mean", 0.3)
    assert not algorithm.rescale
    result = run(algorithm, perturbations=8)
    assert result.records.updates.aggregate.shape[-1] == 8
    assert run(build("mosaic+private_mean", 0.3, direction_groups=2), perturbations=8).records is not None


@pytest.mark.thorough
def test_first_order_methods_are_private_too():
    result = run(build("fed_avg+private_mean", 0.3, clip_norm=0.1, noise_multiplier=0.01))
    assert result.clipped == 1.0
    assert result.privacy.noise_multiplier == 0.01


@pytest.mark.thorough
def test_a_private_run_does_not_end_by_losses_that_nobody_noised():
    """The rate is one at which a run that is not private is stopped for its losses."""
    steep = {"rate": 1e4, "noise_multiplier": 0.0}
    assert run(build(**steep)).diverged_at is None
    assert run(build("decomfl+local_noise", **steep, guard=False)).diverged_at is None
    assert run(build("decomfl", 1e4, guard=False)).diverged_at is not None


def test_what_would_tell_more_is_refused():
    with pytest.raises(ValueError, match="relay must be aggregate for a private mean"):
        build("mosaic+private_mean", relay="messages")
    with pytest.raises(ValueError, match="weighting must be uniform"):
        run(build(), weighting="examples")
    trace = fed.Participation(availability=fed.Trace(np.ones((4, CLIENTS), bool)))
    with pytest.raises(ValueError, match="participation must not follow a trace"):
        fed.Simulation(linear_task(), build(), digits_population(CLIENTS), config(), participation=trace)
    with pytest.raises(ValueError, match="must draw noise once, got local_noise and private_mean"):
        algorithms.load("hiso+local_noise+private_mean")
    with pytest.raises(ValueError, match="must not clip messages beside private_mean"):
        algorithms.load("hiso+clip_to_median+private_mean")


@pytest.mark.thorough
def test_a_private_run_does_not_go_on_without_its_secret_or_with_other_noise(tmp_path):
    for name in ("decomfl+private_mean", "decomfl+local_noise"):
        folder = tmp_path / name
        run(build(name, noise_multiplier=3.0), storage=fed.Storage(folder))
        with pytest.raises(ValueError, match="cannot be continued: what the method measures, sends, combines"):
            run(build(name, noise_multiplier=4.0), storage=fed.Storage(folder, resume=True), rounds=14)
        (folder / "server.secret").unlink()
        with pytest.raises(ValueError, match=r"server\.secret is missing"):
            run(build(name, noise_multiplier=3.0), storage=fed.Storage(folder, resume=True), rounds=14)
