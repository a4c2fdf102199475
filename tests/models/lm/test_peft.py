"""Adapters in the format of PEFT: against the merged model, and against PEFT itself where it is installed."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hiso_jax.checks import ParameterError
from hiso_jax.models import lm
from tests.marks import thorough
from tests.models.lm.checkpoints import CONFIGS
from tests.models.lm.test_export import folder_of

TARGETS = ("q_proj", "o_proj", "up_proj")


def adapted(folder, name):
    """A base model, what is trained of it, and trained values."""
    base = lm.load(folder_of(folder, CONFIGS[name]))
    tuned = lm.tune(base, "lora", lora_rank=3, lora_alpha=5.0, lora_targets=TARGETS)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), tuned.trained)
    return base, tuned, trained


@pytest.mark.parametrize("name", ["opt", thorough("llama-biased"), "qwen3", thorough("smollm3"), thorough("gemma3")])
def test_kernels_with_the_adapters_are_those_of_the_merged_model(name, tmp_path):
    base, tuned, trained = adapted(tmp_path / "base", name)
    lm.save_pretrained(base, tuned, trained, tmp_path / "merged")
    (file,) = lm.save_adapters(base, tuned, trained, tmp_path / "adapters")
    config = json.loads((file.parent / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 5.0, "LORA")
    found = load_file(file)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "merged"))
    changed = {each for each in before if not np.array_equal(before[each], after[each])}
    prefix = "base_model.model."
    modules = {each.removeprefix(prefix).partition(".lora_")[0] for each in found}
    assert {f"{module}.weight" for module in modules} == changed
    assert set(config["target_modules"]) == {module.rpartition(".")[2] for module in modules}
    assert len(modules) == 3 * CONFIGS[name]["num_hidden_layers"]
    for module in modules:
        a, b = (found[f"{prefix}{module}.lora_{side}.weight"] for side in "AB")
        whole = before[f"{module}.weight"] + b @ a * 5 / 3
        np.testing.assert_allclose(whole, after[f"{module}.weight"], atol=1e-6)


def test_other_parts_are_no_adapters(tmp_path):
    base = lm.load(folder_of(tmp_path / "base", CONFIGS["llama"]))
    with pytest.raises(ParameterError, match="format must be hf or delta for a run without --trainable lora"):
        lm.save_adapters(base, lm.tune(base), base.params, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_joined_projections_are_no_adapters_of_peft(tmp_path):
    base = lm.load(folder_of(tmp_path / "base", CONFIGS["phi3"]))
    tuned = lm.tune(base, "lora", lora_targets=TARGETS)
    with pytest.raises(ParameterError, match="must be hf or delta for adapters of q_proj, up_proj in a Phi-3"):
        lm.save_adapters(base, tuned, tuned.trained, tmp_path / "adapters")
    own = lm.tune(base, "lora", lora_targets=("o_proj", "down_proj"))
    lm.save_adapters(base, own, own.trained, tmp_path / "adapters")


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gemma3"])
def test_peft_gives_the_logits_of_the_run(name, tmp_path):
    import peft
    import torch
    import transformers

    base, tuned, trained = adapted(tmp_path / "base", name)
    lm.save_adapters(base, tuned, trained, tmp_path / "adapters")
    lm.save_pretrained(base, lm.tune(base), base.params, tmp_path / "plain")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()
    tokens = np.arange(3, 15).reshape(1, 12).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()
    params = tuned.whole(trained, tuned.frozen)
    found = tuned.decoder.logits(params, tuned.decoder.hidden(params, tokens, np.ones((1, 12), bool)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
