"""The plan of a round: on the devices at hand and, where the compiler is installed, on others."""

import json
import math

import jax
import pytest

import hiso_jax
from hiso_jax import fed, plan, tasks
from hiso_jax.cli.main import main
from hiso_jax.models import lm
from hiso_jax.plan.targets import CHIPS
from hiso_jax.tasks.text import text_shapes


def population(examples, clients):
    shapes = (jax.ShapeDtypeStruct((count,), "int32") for count in (examples, clients + 1))
    return fed.Population(*shapes)


def here(memory=10**9):
    chip = CHIPS["v5e"]
    return plan.Target("here", type(chip)(**{**vars(chip), "memory": memory}), jax.devices()[:1])


def of_digits(target, **config):
    task = tasks.digits()
    params = jax.eval_shape(task.init, jax.random.key(0))
    given = fed.RunSpec(task, params, population(len(task.train["label"]), 50), fed.Participation())
    return plan.plan(given, hiso_jax.hiso(0.01), fed.SimulationConfig(cohort=8, batch_size=16, **config), target)


@pytest.mark.thorough
def test_a_round_is_its_forward_passes():
    made = of_digits(here(), perturbations=3)
    assert made.floor_flops == 4 * (8 * 16) * 2 * (64 * 32 + 32 * 10)
    assert 1 <= made.flops / made.floor_flops <= 1.02
    assert made.fits
    assert made.memory.parameters == made.memory.state - 4 == 4 * 2410
    assert made.messages == ()
    lowered, compiled = made.pins
    assert compiled >= lowered > 20
    assert not [size for size in made.copies if size > 4 * 2410]
    assert made.seconds["round"] == max(made.seconds[part] for part in ("products", "memory", "links"))


@pytest.mark.thorough
def test_what_does_not_fit_is_told_with_what_would():
    made = of_digits(here(memory=1000), perturbations=1)
    assert not made.fits
    advice = plan.advise(made, {"param_dtype": "float32", "directions": "keep"})
    assert any("--param-dtype bfloat16 saves" in sentence for sentence in advice)
    assert "train adapters" in advice[-1]


def test_a_model_of_seven_billion_parameters_is_described_without_any_of_them():
    model = lm.tuned_shapes(lm.Decoder(lm.SHAPES["llama-7b"]), "lora", adapters=lm.Adapters(8, 16.0, ("q_proj",)))
    task = text_shapes("sst2", model, max_length=16)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.frozen))
    assert 6.7e9 < count < 6.8e9
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((model.trained, model.frozen, task.train))
    )


def test_the_command_refuses_what_is_no_target(capsys):
    for words, said in (
        (["--target", "v5x:2x4"], "--target must be one of v4, v5e"),
        (["--target", "v5e"], "a shape, like v5e:2x4"),
        ([], "--target must be given: v5e:2x4"),
        (["--target", "h100:1x1x8", "--model-shards", "0"], "--model-shards must be at least 1"),
        (["--target", "v5e:2x4", "--task", "sst2"], "--model must name an architecture"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        assert ended.value.code == 2
        reported = capsys.readouterr().err
        assert said in reported
        assert reported.count("\n") == 1


def test_the_command_says_which_compiler_is_missing(capsys, monkeypatch):
    def missing(**_):
        raise RuntimeError("no such plug-in")

    monkeypatch.setattr(plan.targets.topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--target", "v5e:2x4"])
    assert ended.value.code == 2
    assert "pip install '.[tpu]'" in capsys.readouterr().err


def printed(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--json", *words])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_a_language_model_on_a_slice_of_tpus(capsys):
    """OPT-125M split over clients and model: FLOPs of forward passes, all pins, and only scalars across clients."""
    pytest.importorskip("libtpu")
    words = ["--task", "sst2", "--model", "opt-125m", "--trainable", "all", "--clients", "600", "--cohort", "8"]
    words += ["--batch-size", "16", "--max-length", "64", "--target", "v5e:2x4", "--model-shards", "2"]
    made = printed(capsys, *words)
    assert made["memory"]["fits"]
    assert made["floor_ratio"] <= 1.02
    assert made["pins"][1] >= made["pins"][0] > 100
    scalars = sum(own["bytes"] for own in made["messages"] if own["axes"] == "clients")
    assert scalars == 4 * 8 * (5 + 1)
    sums = sum(own["count"] for own in made["messages"] if own["axes"] == "model" and own["kind"] == "all-reduce")
    # An evaluation has two sums for each layer and one for the embedding's rows; two more sums check finiteness.
    assert sums <= 6 * (2 * 12 + 1) + 2
