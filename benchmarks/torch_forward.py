"""A forward pass of a language model: this package's decoder, the same model of torch by torchax, and torch itself.

    pip install '.[lm,torch]'
    python benchmarks/torch_forward.py                # OPT-125M's shape, random weights

All three compute the logits at the last position of the same left-padded prompts, in float32, in turn in one process.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from hiso_jax.models.lm.checkpoint import read_config, read_safetensors
from hiso_jax.models.lm.decoder import Decoder
from hiso_jax.models.lm.torch_decoder import load_torch


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      batch, length: prompts, and their tokens.
      layers: layers of the model; OPT-125M has 12.
      repeats: timed calls.
      out: JSON file to write.
    """

    batch: int = 16
    length: int = 64
    layers: int = 12
    repeats: int = 11
    out: Path = Path("benchmarks/results/torch_forward.json")


def main(arguments: Arguments) -> None:
    torch.manual_seed(0)
    config = transformers.OPTConfig(num_hidden_layers=arguments.layers)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (arguments.batch, arguments.length))
    tokens = tokens.astype(np.int32)
    mask = np.arange(arguments.length) >= np.arange(arguments.batch)[:, None] % (arguments.length // 2)
    with tempfile.TemporaryDirectory() as folder:
        module = transformers.OPTForCausalLM(config).eval()
        module.save_pretrained(folder)
        architecture = read_config(Path(folder))
        own, own_params = Decoder(architecture), read_safetensors(Path(folder), architecture)
        content = json.loads((Path(folder) / "config.json").read_text())
        other, other_params = load_torch(Path(folder), content, np.float32)

    def program(decoder):
        return jax.jit(lambda params: decoder.logits(params, decoder.hidden(params, tokens, mask, last=1)[:, 0]))

    given = torch.as_tensor(tokens, dtype=torch.long), torch.as_tensor(mask.astype(np.int64))

    def by_torch(params):
        with torch.no_grad():
            return module(given[0], attention_mask=given[1], logits_to_keep=1).logits[:, 0].numpy()

    runs = {
        "this package's decoder": (program(own), jax.device_put(own_params)),
        "torch's model by torchax": (program(other), jax.device_put(other_params)),
        "torch": (by_torch, None),
    }
    compiled, times, outputs = {}, {name: [] for name in runs}, {}
    for name, (run, params) in runs.items():
        before = time.perf_counter()
        outputs[name] = np.asarray(jax.block_until_ready(run(params)))
        compiled[name] = time.perf_counter() - before
    for _ in range(arguments.repeats):
        for name, (run, params) in runs.items():
            before = time.perf_counter()
            jax.block_until_ready(run(params))
            times[name].append(time.perf_counter() - before)
    own_median = median(times["this package's decoder"])
    table = Table("model", "first call, s", "median, s", "least, s", "of the decoder", "largest difference from torch")
    result: dict[str, Any] = {
        "batch": arguments.batch,
        "length": arguments.length,
        "layers": arguments.layers,
        "rows": {},
    }
    for name, values in times.items():
        away = float(np.abs(outputs[name] - outputs["torch"]).max())
        row = {"first": compiled[name], "median": median(values), "least": min(values), "difference": away}
        result["rows"][name] = row
        ratio = f"{median(values) / own_median:.2f}"
        table.add_row(name, *(f"{row[each]:.3f}" for each in ("first", "median", "least")), ratio, f"{away:.1e}")
    Console().print(table)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
