"""A sharded run is the unsharded run: scalars, replay, copies on the devices, evaluation."""

import functools
import itertools

import jax
import numpy as np
import pytest

import hiso_jax
from hiso_jax import algorithms, fed, zo
from tests.callbacks import StopAt
from tests.fed.problems import assert_trees_identical, digits_population, digits_task, linear_task
from tests.fed.test_selection import by_hand, reading
from tests.marks import slow

MU = 1e-3
# Only the smallest mesh divides five clients.
SETTINGS = {"rounds": 12, "cohort": 5, "local_steps": 2, "perturbations": 3, "batch_size": 8, "mu": MU}


def run(mesh, storage=None, *, stop_at=None, dispatch=12):
    config = fed.SimulationConfig(**SETTINGS, eval_every=12, rounds_per_dispatch=dispatch, local_learning_rate=0.01)
    simulation = fed.Simulation(
        linear_task(), hiso_jax.hiso(0.02), digits_population(), config, mesh=mesh, storage=storage
    )
    if stop_at is not None:
        simulation.callbacks = (StopAt(stop_at),)
    return simulation.run()


@functools.cache
def unsharded():
    return run(None)


def test_a_sharded_run(mesh, monkeypatch):
    on_devices = []
    gather = fed.devices.placement.to_host
    monkeypatch.setattr(fed.devices.placement, "to_host", lambda tree: on_devices.append(tree) or gather(tree))
    result, alone = run(mesh), unsharded()

    # In the first round the state is the same, so the clients measure the same up to rounding.
    tolerance = 8 * 2**-23 * abs(float(alone.records.loss[0])) / MU
    np.testing.assert_allclose(result.records.scalars[0, :, 0], alone.records.scalars[0, :, 0], atol=tolerance)
    np.testing.assert_array_equal(result.records.cohort, alone.records.cohort)
    assert result.records.scalars.shape == (12, 5, 2, 3)
    assert result.records.valid.all()
    np.testing.assert_allclose(result.metrics[0].metrics["loss"], alone.metrics[0].metrics["loss"], rtol=1e-5)

    # One device rebuilds the run from the ledger, bit for bit.
    rebuilt = fed.replay(result.initial_params, hiso_jax.hiso(0.02), result.records)
    assert_trees_identical((result.params, result.state), rebuilt)

    # Every device holds the same copies.
    for leaf in jax.tree.leaves(on_devices):
        copies = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
        assert sum(map(len, copies.values())) == mesh.size
        assert all(len(set(same)) == 1 for same in copies.values())
    assert result.mesh_shape == dict(mesh.shape)


@pytest.mark.parametrize("mesh", ["2x4", slow("8")], indirect=True)
def test_a_sharded_run_that_was_stopped_goes_on(mesh, tmp_path):
    """The run resumes from a snapshot after round 6 and the ledger, to the last bit."""
    stopped = run(mesh, fed.Storage(tmp_path / "run", snapshot_every=6), stop_at=9, dispatch=3)
    assert (stopped.rounds, stopped.interrupted) == (9, True)
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["6"]
    resumed, whole = run(mesh, fed.Storage(tmp_path / "run", resume=True), dispatch=3), run(mesh)
    assert_trees_identical((resumed.params, resumed.state), (whole.params, whole.state))
    assert resumed.traffic == whole.traffic


@pytest.mark.parametrize("mesh", ["2x4", slow("8")], indirect=True)
def test_a_rule_selects_by_the_losses_of_the_ledger(mesh):
    config = fed.SimulationConfig(**{**SETTINGS, "cohort": 4, "local_steps": 1}, eval_every=12)
    participation = fed.Participation(fed.Bernoulli(0.7), select=reading)
    records = (
        fed.Simulation(
            linear_task(), hiso_jax.hiso(0.02), digits_population(), config, mesh=mesh, participation=participation
        )
        .run()
        .records
    )
    assert not records.valid.all()
    np.testing.assert_array_equal(records.cohort, by_hand(records, digits_population().num_clients))


def test_large_parameters_are_split_over_model(mesh):
    params = {"square": np.zeros((8, 40)), "tall": np.zeros((12, 3)), "odd": np.zeros((3, 5)), "scalar": np.zeros(())}
    state = hiso_jax.hiso(0.1).init(jax.tree.map(jax.numpy.asarray, params))
    where = fed.devices.param_shardings(mesh, params)
    shards = mesh.shape["model"]
    split = {name: params[name].size // np.prod(s.shard_shape(params[name].shape)) for name, s in where.items()}
    assert split == {"square": shards, "tall": shards, "odd": 1, "scalar": 1}
    own = fed.devices.state_shardings(mesh, params, state)
    assert jax.tree.map(lambda x: x.spec, own[0].curvature) == jax.tree.map(lambda x: x.spec, where)
    assert own[0].rounds.is_fully_replicated


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_spheres_are_not_split(mesh):
    tx = hiso_jax.hiso(0.02, sampler=hiso_jax.sphere)
    with pytest.raises(ValueError, match="mesh must not split parameters along model with the sampler sphere"):
        fed.Simulation(linear_task(), tx, digits_population(), fed.SimulationConfig(cohort=5), mesh=mesh)


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
@pytest.mark.parametrize("tx", [slow(hiso_jax.scale_by_zo()), hiso_jax.scale_by_hiso()])
def test_a_heads_init_and_update_keep_the_parameters_sharding(mesh, tx):
    """optax requires that arrays like the parameters live where the parameters live; their numbers stay the same."""
    params = {"w": jax.numpy.ones((16, 64)), "b": jax.numpy.ones(64)}
    where = fed.devices.param_shardings(mesh, params)
    scalars, key = jax.numpy.ones((2, 3)), jax.random.key(0)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, where)
        for update in (tx.update, jax.jit(tx.update)):
            state = tx.init(placed)
            updates, after = update(scalars, state, placed, key=key)
            like = [updates, *(each.curvature for each in (state, after) if each.curvature is not None)]
            for tree in like:
                same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, where)
                assert all(jax.tree.leaves(same))
    alone, _ = tx.update(scalars, tx.init(params), params, key=key)
    assert_trees_identical(jax.tree.map(np.asarray, updates), jax.tree.map(np.asarray, alone))


@pytest.mark.parametrize("mesh", ["8", slow("2x4")], indirect=True)
@pytest.mark.parametrize("make", [algorithms.fed_avg, slow(algorithms.fed_adam)])
def test_first_order_clients_on_a_mesh(mesh, make):
    """Clients are summed on each device, then over the devices; the result is the same up to rounding."""

    def run_on(mesh):
        config = fed.SimulationConfig(**(SETTINGS | {"rounds": 6}), eval_every=6)
        return fed.Simulation(linear_task(), make(0.05), digits_population(), config, mesh=mesh).run()

    result, alone = run_on(mesh), run_on(None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), result.params, alone.params)
    np.testing.assert_allclose(result.records.loss, alone.records.loss, rtol=1e-4)
    assert result.records.valid.all()


MATRIX = list(itertools.product((1, 2, 4, 8, 32), (1, 2, 5), (1, 3), ("keep", "regenerate")))
CASES = [(mesh, *case) for mesh in ("8", "2x4") for case in MATRIX if case[2:] != (3, "keep")]
LIGHT = [("8", 2, 5, 1, "regenerate")]


@pytest.mark.parametrize(
    ("mesh", "bits", "groups", "steps", "directions"),
    [case if case in LIGHT else slow(*case) for case in CASES],
    indirect=["mesh"],
)
def test_clients_with_directions_of_their_own_on_a_mesh(mesh, bits, groups, steps, directions):
    """One device rebuilds the run from the sent messages; its first round measures the same up to rounding."""
    method = hiso_jax.mosaic(0.05, scalar_bits=bits, direction_groups=groups)

    def run_on(mesh):
        settings = SETTINGS | {"rounds": 4, "local_steps": steps}
        config = fed.SimulationConfig(**settings, eval_every=4, local_learning_rate=0.01, directions=directions)
        return fed.Simulation(linear_task(), method, digits_population(), config, mesh=mesh).run()

    result = run_on(mesh)
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))
    if bits == 32:
        alone = run_on(None)
        tolerance = 8 * 2**-23 * abs(float(alone.records.loss[0])) / MU
        np.testing.assert_allclose(result.records.scalars[0, :, 0], alone.records.scalars[0, :, 0], atol=tolerance)


@pytest.mark.parametrize("share", [0.5, slow(None)])
@pytest.mark.parametrize("name", ["local_mosaic", slow("fed_scalar")])
def test_projections_on_a_mesh(mesh, name, share):
    """One device rebuilds the run from its scalars; its first round measures the same up to rounding."""
    method = getattr(algorithms, name)(0.5, sampler="gaussian")

    def run_on(mesh):
        settings = SETTINGS | {"rounds": 4, "local_steps": 3}
        config = fed.SimulationConfig(**settings, eval_every=4, local_learning_rate=0.05, backprop_share=share)
        return fed.Simulation(linear_task(), method, digits_population(), config, mesh=mesh).run()

    result, alone = run_on(mesh), run_on(None)
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))
    first, other = (jax.tree.leaves(each.records.scalars)[0][0].astype(float) for each in (result, alone))
    # Codes of one bit may differ where a scalar is nearly zero.
    rounding = 1e-4 if share is None else 8 * 2**-23 * abs(float(alone.records.loss[0])) / MU
    assert np.mean(np.isclose(first, other, rtol=1e-4, atol=rounding)) > 0.95


@pytest.mark.parametrize("name", ["mosaic", slow("local_mosaic"), slow("hiso")])
def test_hadamard_directions_on_a_mesh(mesh, name):
    """One device rebuilds the run; parameters split over model are refused, because a block is on one device."""
    method = algorithms.load(name).build(0.05, {"sampler": "hadamard"})
    config = fed.SimulationConfig(**(SETTINGS | {"rounds": 4}), eval_every=4, local_learning_rate=0.01)

    def simulation(mesh):
        return fed.Simulation(linear_task(), method, digits_population(), config, mesh=mesh)

    if mesh.shape["model"] > 1:
        with pytest.raises(ValueError, match="mesh must not split parameters along model with the sampler hadamard"):
            simulation(mesh).run()
        return
    result, alone = simulation(mesh).run(), simulation(None).run()
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, method, result.records))
    np.testing.assert_allclose(result.records.loss[0], alone.records.loss[0], rtol=1e-5)


@pytest.mark.parametrize("groups", [None, slow(1)])
def test_directions_of_low_rank_on_a_mesh(mesh, groups):
    """One device replays the run to the bit; a factored curvature is not split."""
    sampler = zo.Directions(zo.LowRank(), groups=groups)
    form = "factored" if mesh.shape["model"] == 1 else "diagonal"
    tx = hiso_jax.hiso(0.02, curvature_form=form, sampler=sampler)
    config = fed.SimulationConfig(rounds=6, cohort=5, perturbations=2, batch_size=8, eval_every=6)

    def simulation(tx):
        return fed.Simulation(digits_task(), tx, digits_population(), config, mesh=mesh)

    result = simulation(tx).run()
    assert_trees_identical((result.params, result.state), fed.replay(result.initial_params, tx, result.records))
    if form == "diagonal":
        with pytest.raises(ValueError, match="mesh must not split parameters along model with a curvature of means"):
            simulation(hiso_jax.hiso(0.02, sampler=sampler))


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
@pytest.mark.parametrize("name", ["hiso+multi_krum+sign_flip", "mosaic+private_mean"])
def test_attacked_and_private_runs_are_sharded_and_go_on(mesh, name, tmp_path):
    """The hostile clients are the same, the guard's memory comes back, and one device rebuilds the run to the bit."""
    algorithm = algorithms.load(name).build(0.02, {})
    hostile = {"attackers": 0.25} if algorithm.attack else {}
    settings = {**SETTINGS, "local_steps": 1, "perturbations": 4, **hostile}
    config = fed.SimulationConfig(**settings, eval_every=6, rounds_per_dispatch=3)

    def simulation(where, storage=None):
        return fed.Simulation(linear_task(), algorithm, digits_population(), config, mesh=where, storage=storage)

    stopping = simulation(mesh, fed.Storage(tmp_path / "run", snapshot_every=6))
    stopping.callbacks = (StopAt(9),)
    assert stopping.run().interrupted
    result = simulation(mesh, fed.Storage(tmp_path / "run", resume=True)).run()
    assert result.rounds == 12
    rebuilt = fed.replay(result.initial_params, algorithm, result.records)
    assert_trees_identical((result.params, result.state), rebuilt)
    if algorithm.attack:
        alone, sharded = simulation(None).run().records, result.records
        np.testing.assert_array_equal(alone.cohort, sharded.cohort)
        np.testing.assert_allclose(alone.scalars[0], sharded.scalars[0], rtol=1e-2, atol=0.02)
        whole = simulation(mesh).run()
        assert_trees_identical(whole.params, result.params)
