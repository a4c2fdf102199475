"""Language models whose architecture the decoder does not know, through torch."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiso_jax import Experiment, fed
from hiso_jax.checks import ParameterError
from hiso_jax.models import lm
from tests.fed.problems import assert_trees_identical
from tests.models.lm.checkpoints import WORDS, inputs, torch_logits, write_tokenizer
from tests.tasks.text.problems import data_folder

pytestmark = pytest.mark.thorough
torch = pytest.importorskip("torch", reason="the extra torch is not installed")
if importlib.util.find_spec("torchax") is None:
    pytest.skip("the extra torch is not installed", allow_module_level=True)
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SMALL, **HIDDEN, "intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WIDE),
    # Without position ids: linear biases of attention.
    "bloom": lambda: transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
    # A recurrence.
    "mamba": lambda: transformers.MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2, state_size=8),
    "olmo2": lambda: transformers.Olmo2Config(**WIDE, pad_token_id=1),
}


def folder_of(path, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(3)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_torch(name, tmp_path):
    model = lm.load(folder_of(tmp_path, name))
    tokens, mask = inputs("left")
    run = jax.jit(lambda params, last: model.decoder.hidden(params, tokens, mask, last=last), static_argnums=1)
    found = run(model.params, None)
    expected = torch_logits(tmp_path, "left")
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(run(model.params, 3), found[:, -3:], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_generation_is_that_of_whole_passes(name, tmp_path):
    model = lm.load(folder_of(tmp_path, name))
    tokens, mask = inputs("left")
    run = jax.jit(
        lambda params: lm.greedy(model.decoder, params, tokens, mask, max_new_tokens=4, stop_tokens=(-1,), pad_token=1)
    )
    found, again = run(model.params), jax.jit(lambda params, t, m: model.decoder.hidden(params, t, m, last=1)[:, 0])
    for place in range(4):
        following = np.asarray(again(model.params, jnp.asarray(tokens), jnp.asarray(mask))).argmax(-1)
        np.testing.assert_array_equal(found[:, place], following)
        tokens = np.concatenate([tokens, following[:, None].astype(np.int32)], 1)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)


def adapted(folder, targets=("c_attn", "c_fc")):
    base = lm.load(folder)
    tuned = lm.tune(base, "lora", lora_rank=3, lora_alpha=5.0, lora_targets=targets)
    rng = np.random.default_rng(0)
    return base, tuned, {name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in tuned.trained.items()}


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", ("c_attn", "c_fc")), ("gpt_neox", ("dense", "query_key_value"))]
)
def test_adapters_are_exported(name, targets, tmp_path):
    """Merged, and in PEFT's format, for weights of either layout."""
    base, tuned, trained = adapted(folder_of(tmp_path / "base", name), targets)
    tokens = np.arange(3, 15).reshape(1, 12).astype(np.int32)
    run = jax.jit(tuned.decoder.hidden)
    plain = run(tuned.whole(tuned.trained, tuned.frozen), tokens)
    np.testing.assert_allclose(plain, base.decoder.hidden(base.params, jnp.asarray(tokens)), atol=1e-5)
    found = run(tuned.whole(trained, tuned.frozen), tokens)
    assert np.abs(found - plain).max() > 0.1
    lm.save_pretrained(base, tuned, trained, tmp_path / "merged")
    lm.save_adapters(base, tuned, trained, tmp_path / "adapters")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = whole(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert lm.load(tmp_path / "merged").tokenizer("it was")["input_ids"] == base.tokenizer("it was")["input_ids"]
    if importlib.util.find_spec("peft") is None:
        return
    import peft

    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters"
    ).eval()
    with torch.no_grad():
        logits = theirs(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(expected).max())


def experiment_of(gpt2, data, **given):
    return Experiment(
        model=str(gpt2), data_dir=data, learning_rate=0.005, rounds=6, eval_every=3, clients=4, cohort=2,
        batch_size=4, mu=1e-3, **given,
    )  # fmt: skip


CLASSES = {"task": "text-classification", "template": "{text} it was", "verbalizer": (" terrible", " great")}


@pytest.mark.parametrize(
    "given",
    [
        {"algorithm": "mosaic", "trainable": "lora", "lora_targets": ("c_attn",)},
        {"algorithm": "decomfl", "trainable": r"h\.1\..*c_fc"},
    ],
)
def test_a_run_replays_and_resumes(gpt2, tmp_path, given):
    data = data_folder(tmp_path / "data")
    experiment = experiment_of(gpt2, data, **CLASSES, **given)
    result = experiment.run(tmp_path / "run")
    replayed, _ = fed.replay(result.initial_params, experiment.algorithm, result.records)
    assert_trees_identical(replayed, result.params)
    assert result.zeros < 0.5
    stopping = fed.Callback(lambda session, evaluation: session.round >= 3 and session.stop())
    experiment_of(gpt2, data, **CLASSES, **given).run(tmp_path / "half", callbacks=stopping)
    again = experiment_of(gpt2, data, **CLASSES, **given).run(tmp_path / "half", resume=True)
    assert_trees_identical(again.params, result.params)


def test_a_task_of_generation_runs(gpt2, tmp_path):
    (tmp_path / "data").mkdir()
    row = {
        "title": "sky",
        "context": "the sky is blue",
        "question": "what color is the sky",
        "answers": {"text": ["blue"]},
    }
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    result = experiment_of(
        gpt2, tmp_path / "data", task="squad", trainable="lora", lora_targets=("c_attn",), algorithm="decomfl",
        max_new_tokens=3, objective="f1",
    ).run()  # fmt: skip
    assert set(result.metrics[-1].metrics) == {"loss", "exact_match", "f1"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"trainable": "lora"}, "lora_targets must be of c_attn, c_fc, c_proj for gpt2; got q_proj"),
        ({"trainable": "head"}, "trainable must be all, lora or a pattern of names for gpt2"),
        ({"trainable": "prefix"}, "trainable must be all, lora or a pattern of names for gpt2"),
        ({"trainable": "nothing_like_it"}, "names none of transformer.h.0.attn"),
        ({"trainable": "lora", "lora_targets": ("c_fc",), "lora_rank": 64}, "lora_rank must be at least 1 and at most"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(gpt2, given, sentence):
    with pytest.raises(ParameterError, match=sentence):
        lm.tune(lm.load(gpt2), **given)


def test_what_is_no_language_model_is_one_sentence(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**HIDDEN, intermediate_size=64, image_size=16, patch_size=4))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ParameterError, match="model must be a causal language model that transformers reads; vit"):
        lm.load(tmp_path)


def test_words_are_in_the_vocabulary():
    assert len(WORDS) <= SMALL["vocab_size"]
