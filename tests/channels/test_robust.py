"""Combiners that compare messages, clipping, and attacks: each by itself, compared with NumPy."""

from fractions import Fraction
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hiso_jax import channels, fed

KEY = jax.random.key(0)


def senders(clients, hostile=(), groups=1, absent=()):
    numbers = jnp.arange(clients)
    wicked = jnp.isin(numbers, jnp.array(list(hostile), int))
    return fed.Senders(numbers, numbers, wicked, ~wicked & ~jnp.isin(numbers, jnp.array(list(absent), int)), groups)


def random_messages(seed, clients=9, numbers=4):
    rng = np.random.default_rng(seed)
    weights = (rng.random(clients) < 0.8).astype(np.float32)
    weights[:4] = 1
    messages = rng.normal(size=(clients, 1, numbers)).astype(np.float32)
    return np.where(weights[:, None, None] > 0, messages, np.nan), weights


def krum_order(messages, weights, hostile):
    """The clients with a positive weight, ordered by their Krum score."""
    kept = np.flatnonzero(weights)
    rows = messages.reshape(len(messages), -1)[kept].astype(np.float64)
    away = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    nearest = max(len(kept) - ceil(Fraction(str(hostile)) * len(kept)) - 2, 1)
    scores = np.array([np.sort(np.delete(each, i))[:nearest].sum() for i, each in enumerate(away)])
    # Two clients that are each other's nearest have equal scores.
    assume(np.diff(np.sort(scores)).min() > 1e-4)
    return kept[np.argsort(scores)]


@given(seed=st.integers(0, 999), hostile=st.sampled_from([0.0, 0.2, 0.3, 0.45]))
def test_krum_and_multi_krum_are_those_of_their_paper(seed, hostile):
    messages, weights = random_messages(seed)
    order = krum_order(messages, weights, hostile)
    best = channels.krum(hostile=hostile)(jnp.array(messages), jnp.array(weights), KEY)
    np.testing.assert_array_equal(best, messages[order[0]])
    kept = order[: max(len(order) - ceil(Fraction(str(hostile)) * len(order)), 1)]
    several = channels.multi_krum(hostile=hostile)(jnp.array(messages), jnp.array(weights), KEY)
    np.testing.assert_allclose(several, messages[kept].mean(0), rtol=1e-5, atol=1e-6)


def test_shares_are_counted_as_they_are_written():
    """In float32, 0.3 · 50 is above 15, and 0.42 · 150 is below 63."""
    # Each message has an axis of its own, so the mean shows which messages it holds.
    mean = channels.multi_krum(hostile=0.3)(jnp.eye(50), jnp.ones(50), KEY)
    assert int((mean > 0).sum()) == 35
    row = jnp.concatenate([jnp.zeros(63), jnp.ones(24), jnp.full(63, 5.0)])
    assert channels.trimmed_mean(trim=0.42)(row, jnp.ones(150), KEY) == 1


@given(seed=st.integers(0, 999))
def test_the_geometric_median_has_the_smallest_sum_of_distances(seed):
    messages, weights = random_messages(seed)
    found = np.asarray(channels.geometric_median(weiszfeld_steps=200)(jnp.array(messages), jnp.array(weights), KEY))
    rows = messages.reshape(len(messages), -1)[weights > 0].astype(np.float64)

    def total(point):
        return np.linalg.norm(rows - point.reshape(-1), axis=1).sum()

    steps = 1e-2 * np.random.default_rng(seed).normal(size=(40, found.size))
    assert total(found) <= min(total(found.reshape(-1) + step) for step in steps) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median", "median", "trimmed_mean"])
def test_a_minority_that_is_far_away_does_not_decide(name):
    messages = np.random.default_rng(0).normal(size=(10, 1, 5)).astype(np.float32)
    messages[:3] = 1e25 * np.array([1, -1, 1], np.float32)[:, None, None]
    options = {"trim": 0.3} if name == "trimmed_mean" else {}
    combined = channels.FACTORIES[name](**options)(jnp.array(messages), jnp.ones(10), KEY)
    assert np.abs(combined).max() < 4


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["krum", "multi_krum", "geometric_median"])
def test_trees_and_empty_cohorts(name):
    rng = np.random.default_rng(1)
    tree = {
        "b": jnp.array(rng.normal(size=(6, 3)), jnp.float32),
        "w": jnp.array(rng.normal(size=(6, 2, 2)), jnp.float32),
    }
    flat = jnp.concatenate([tree["b"], tree["w"].reshape(6, -1)], 1)[:, None]
    combine = channels.FACTORIES[name]()
    found, wanted = combine(tree, jnp.ones(6), KEY), combine(flat, jnp.ones(6), KEY)
    np.testing.assert_allclose(jnp.concatenate([found["b"], found["w"].reshape(-1)]), wanted[0], rtol=1e-5)
    assert not np.any(combine(jnp.full((4, 1, 2), jnp.nan), jnp.zeros(4), KEY))


@pytest.mark.thorough
def test_krum_of_a_large_cohort_compares_with_some_of_it():
    messages = jnp.array(np.random.default_rng(0).normal(size=(1500, 1, 3)), jnp.float32).at[:400].add(30.0)
    combined = channels.multi_krum(hostile=0.3)(messages, jnp.ones(1500), KEY)
    assert np.abs(combined).max() < 0.2


# ---------------------------------------------------------------- clipping


def lengths_after(rescale, lengths, state=None, weights=None):
    """The lengths of clipped messages, as root mean squares, and the state after the round."""
    messages = jnp.array(lengths, jnp.float32)[:, None, None] * jnp.ones((1, 1, 4))
    if state is None and rescale.init is not None:
        state = rescale.init(jax.eval_shape(lambda: messages))
    factors, state = rescale.advance(messages, jnp.ones(len(lengths)) if weights is None else weights, state)
    return np.asarray(factors) * np.array(lengths, np.float32), state


def test_the_guard_shortens_what_is_far_beyond_the_median_and_nothing_else():
    found, _ = lengths_after(channels.guard(), [1.0, 2.0, 2.9, 3.0, 1e30])
    np.testing.assert_allclose(found, [1.0, 2.0, 2.9, 3.0, 2.9], rtol=1e-6)
    found, _ = lengths_after(channels.guard(), [1.0, 1.0, 3.1, 0.0])
    np.testing.assert_allclose(found, [1.0, 1.0, 1.0, 0.0], rtol=1e-6)


@pytest.mark.thorough
def test_the_guard_remembers_what_messages_used_to_be():
    guard, state = channels.guard(), None
    for _ in range(40):
        _, state = lengths_after(guard, [1.0, 1.0, 1.0, 1.0], state)
    # The majority of this cohort is hostile: its messages are clipped to 1.5 times the usual length.
    found, after = lengths_after(guard, [1e6, 1e6, 1e6, 1.0], state)
    np.testing.assert_allclose(found, [1.5, 1.5, 1.5, 1.0], rtol=1e-6)
    # A hostile majority in every round raises the cap by half in sixteen rounds at most.
    for _ in range(16):
        found, after = lengths_after(guard, [1e6, 1e6, 1e6, 1.0], after)
    assert found.max() <= 1.5**2


@pytest.mark.thorough
def test_the_guard_follows_an_honest_scale_and_skips_rounds_without_one():
    guard, state = channels.guard(), None
    for round_number in range(200):
        size = 1.02**round_number
        found, state = lengths_after(guard, [size, 1.5 * size, 0.7 * size], state)
        np.testing.assert_array_equal(found, np.array([size, 1.5 * size, 0.7 * size], np.float32))
    kept = state
    _, state = lengths_after(guard, [0.0, 0.0, 0.0], state)
    np.testing.assert_array_equal(state, kept)
    _, state = lengths_after(guard, [5.0, 5.0, 5.0], state, jnp.zeros(3))
    np.testing.assert_array_equal(state, kept)


def test_slopes_and_curvatures_are_guarded_each_by_itself():
    slope = jnp.ones((4, 1, 3)).at[0].set(50.0)
    messages = {"slope": slope, "curvature": 1e6 * jnp.ones((4, 1, 3))}
    guard = channels.guard()
    factors, _ = guard.factors(messages, jnp.ones(4), guard.init(messages))
    np.testing.assert_allclose(factors, [0.02, 1, 1, 1], rtol=1e-6)


def test_clients_without_a_loss_do_not_silence_the_others():
    found, _ = lengths_after(channels.clip_to_median(), [0.0, 0.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(found, [0, 0, 0, 1, 1])


# ---------------------------------------------------------------- attacks


def forged(attack, messages, who):
    return np.asarray(attack.apply(jnp.array(messages), who, KEY))


def test_attacks_are_what_their_papers_say():
    numbers = np.array([1.0, 2.0, 3.0, 4.0, 100.0, np.nan], np.float32)
    who = senders(6, hostile=[4], absent=[3])
    honest = numbers[:3]
    np.testing.assert_allclose(forged(channels.sign_flip(attack_scale=3.0), numbers, who)[4], -300)
    np.testing.assert_allclose(forged(channels.scaled(attack_scale=3.0), numbers, who)[4], 300)
    np.testing.assert_allclose(forged(channels.inner_product(attack_scale=2.0), numbers, who)[4], -2 * honest.mean())
    wanted = honest.mean() - 1.5 * honest.std()
    np.testing.assert_allclose(forged(channels.colluding(deviations=1.5), numbers, who)[4], wanted, rtol=1e-6)


def test_gaussian_noise_is_as_large_as_it_says():
    numbers = np.ones(20000, np.float32)
    found = forged(channels.gaussian_attack(attack_scale=7.0), numbers, senders(20000, hostile=range(100)))
    assert abs(found.mean()) < 0.2
    assert found.std() == pytest.approx(7, rel=0.03)


def test_the_hostile_know_their_own_group():
    """Honest clients with directions of their own give no information about a hostile client's directions."""
    numbers = np.array([1.0, 10.0, 3.0, 30.0], np.float32)
    attack = channels.inner_product(attack_scale=1.0)
    two = forged(attack, numbers, senders(4, hostile=[0, 1], groups=2))
    np.testing.assert_allclose(two[:2], [-3, -30])
    np.testing.assert_allclose(forged(attack, numbers, senders(4, hostile=[0], groups=4))[0], -1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: channels.krum(hostile=0.5), "hostile must be at least 0 and below 0.5, got 0.5"),
        (lambda: channels.geometric_median(weiszfeld_steps=0), "weiszfeld_steps must be"),
        (lambda: channels.sign_flip(attack_scale=-1.0), "attack_scale must be"),
        (lambda: channels.colluding(deviations=float("nan")), "deviations must be"),
        (lambda: channels.private_mean(clip_norm=0.0), "clip_norm must be a positive finite number, got 0.0"),
        (lambda: channels.local_noise(noise_multiplier=-1.0), "noise_multiplier must be"),
    ],
)
def test_options_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.thorough
def test_tiny_messages_of_a_hostile_majority_do_not_silence_the_others():
    guard, state = channels.guard(), None
    for _ in range(40):
        _, state = lengths_after(guard, [1.0, 1.0, 1.0, 1.0], state)
    for _ in range(10):
        found, state = lengths_after(guard, [1e-6, 1e-6, 1e-6, 1.0], state)
        assert found[3] == 1.0


@pytest.mark.thorough
def test_of_two_clients_neither_silences_the_other():
    guard, state = channels.guard(), None
    for _ in range(40):
        found, state = lengths_after(guard, [1.0, 1.0], state)
        np.testing.assert_array_equal(found, [1.0, 1.0])
    found, state = lengths_after(guard, [1e-6, 1.0], state)
    assert found[1] == 1.0
    found, _ = lengths_after(guard, [1e6, 1.0], state)
    assert found[0] <= 1.5


@pytest.mark.thorough
def test_few_that_count_of_a_large_cohort_are_compared_with_one_another():
    """The 128 peers are drawn from clients of positive weight; once, three such clients of a thousand had no peer."""
    counting = np.array([17, 400, 812])
    messages = jnp.zeros((1000, 1, 2)).at[counting].set(jnp.array([[[1.0, 1.0]], [[1.1, 1.0]], [[9.0, 9.0]]]))
    weights = jnp.zeros(1000).at[counting].set(1.0)
    for seed in range(3):
        chosen = np.asarray(channels.krum(hostile=0.3)(messages, weights, jax.random.key(seed)))
        assert chosen.max() < 2
