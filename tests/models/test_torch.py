"""Torch modules as functions of JAX, against torch itself."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax
from hiso_jax import fed, tasks
from hiso_jax.checks import ParameterError
from hiso_jax.models.torch import from_torch
from tests.fed.problems import assert_trees_identical

pytestmark = pytest.mark.thorough
torch = pytest.importorskip("torch", reason="the extra torch is not installed")
if importlib.util.find_spec("torchax") is None:  # which torch's names must precede, see models.torch
    pytest.skip("the extra torch is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 100, "num_labels": 3}


def convolutional():
    """A module with buffers: running means of batch normalisation."""
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()]
    made = torch.nn.Sequential(*layers, torch.nn.Linear(8 * 49, 3))
    made[1].running_mean.normal_()
    return made


def gemma3():
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "num_hidden_layers": 7}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**TEXT, **more}))


def phi3():
    more = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT, **more))


MODULES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)),
    "gemma3": gemma3,
    "phi3": phi3,
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    ),
    "convolutional": convolutional,
}


def module(name):
    torch.manual_seed(0)
    return MODULES[name]()


def inputs(name, count=3):
    rng = np.random.default_rng(0)
    if name == "convolutional":
        return rng.normal(size=(count, 3, 16, 16)).astype(np.float32)
    if name == "vit":
        return {"pixel_values": rng.normal(size=(count, 3, 16, 16)).astype(np.float32)}
    mask = np.ones((count, 9), np.int32)
    mask[0, 6:] = 0
    return {"input_ids": rng.integers(3, 100, (count, 9)).astype(np.int32), "attention_mask": mask}


def by_torch(made, given):
    with torch.no_grad():
        if isinstance(given, dict):
            return made(**{name: torch.as_tensor(each) for name, each in given.items()}).logits.numpy()
        return made(torch.as_tensor(given)).numpy()


@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_torch(name):
    made = module(name)
    model = from_torch(made)
    params, given = model.init(jax.random.key(0)), inputs(name)
    np.testing.assert_allclose(jax.jit(model.apply)(params, given), by_torch(made, given), atol=1e-5)
    assert sum(map(np.size, params.values())) == sum(each.numel() for each in made.parameters())


@pytest.mark.parametrize("name", ["bert", "convolutional"])
def test_gradients_and_vmaps_are_those_of_torch(name):
    made = module(name)
    model, given = from_torch(made), inputs(name)
    params = model.init(jax.random.key(0))
    found = jax.jit(jax.grad(lambda params: model.apply(params, given).sum()))(params)
    taken = made(**{key: torch.as_tensor(each) for key, each in given.items()}).logits if name == "bert" else None
    (made(torch.as_tensor(given)) if taken is None else taken).sum().backward()
    expected = {key: each.grad.numpy() for key, each in made.named_parameters()}
    for key, gradient in expected.items():
        np.testing.assert_allclose(found[key], gradient, atol=1e-4)
    several = jax.tree.map(lambda each: jnp.stack([each, 1.1 * each]), params)
    both = jax.vmap(lambda params: model.apply(params, given))(several)
    np.testing.assert_allclose(both[0], model.apply(params, given), atol=1e-5)


def test_a_federation_trains_a_part_of_it_and_replays_to_the_bit():
    model = from_torch(module("bert"))
    given = inputs("bert", 24)
    data = {"input": given, "label": (given["input_ids"][:, 0] % 3).astype(np.int32)}
    whole = tasks.Classification(model.init, model.apply, data, data)
    names = [name for name in model.init(jax.random.key(0)) if name.startswith(("classifier", "bert.pooler"))]
    task = tasks.train_only(whole, *names)
    assert set(task.init(jax.random.key(1))) == set(names)
    for algorithm in (hiso_jax.decomfl(0.05), hiso_jax.local_mosaic(0.5)):
        config = fed.SimulationConfig(rounds=4, cohort=2, batch_size=4, eval_every=4)
        result = fed.Simulation(task, algorithm, fed.iid(24, 4), config).run()
        assert np.isfinite(result.metrics[-1].metrics["loss"])
        replayed, _ = fed.replay(result.initial_params, algorithm, result.records)
        assert_trees_identical(replayed, result.params)
        moved = [name for name in names if not np.array_equal(result.params[name], result.initial_params[name])]
        assert moved


def test_outputs_may_be_chosen():
    made = module("bert")
    model = from_torch(made, output=lambda returned: returned.logits[:, 1:])
    given = inputs("bert")
    found = model.apply(model.init(jax.random.key(0)), given)
    np.testing.assert_allclose(found, by_torch(made, given)[:, 1:], atol=1e-5)


def test_tied_parameters_are_one():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4, bias=False)
            self.second = torch.nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    made = Tied()
    model = from_torch(made)
    params = model.init(jax.random.key(0))
    assert len(params) == 1
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    np.testing.assert_allclose(model.apply(params, x), made(torch.as_tensor(x)).detach().numpy(), atol=1e-6)


def test_dropout_is_off():
    made = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2)).train()
    model = from_torch(made)
    params = model.init(jax.random.key(0))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(model.apply(params, x), model.apply(params, x))


def test_refusals():
    with pytest.raises(ParameterError, match=r"module must be a torch\.nn\.Module, got"):
        from_torch(lambda x: x)

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    model = from_torch(Odd())
    with pytest.raises(ParameterError, match=r"has an operator that torchax does not translate: .*airy_ai"):
        jax.jit(model.apply)({}, np.ones(4, np.float32))

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ParameterError, match=r"whatever the values of its inputs.*test_torch.py:\d+ does not: return x if"
    ):
        jax.jit(from_torch(Branch()).apply)({}, np.ones(4, np.float32))
    with pytest.raises(ParameterError, match="must be on the CPU"):
        from_torch(torch.nn.Linear(2, 2, device="meta"))
