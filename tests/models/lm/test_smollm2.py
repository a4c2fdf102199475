"""A real pretrained model from its GGUF file, against transformers' torch model of the same file.

    SMOLLM2_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf REVIEWS=validation.jsonl pytest -m slow tests/models/lm/test_smollm2.py

It needs torch and accelerate, and two files that are too large for the repository.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from hiso_jax.models import lm

GGUF, REVIEWS = os.environ.get("SMOLLM2_GGUF"), os.environ.get("REVIEWS")
MISSING = [name for name in ("torch", "accelerate") if importlib.util.find_spec(name) is None]
WIDTH = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (GGUF and REVIEWS), reason="SMOLLM2_GGUF and REVIEWS name no files"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def test_logits_tokens_and_choices_are_those_of_torch():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(GGUF)
    ours = lm.load(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    texts = [json.loads(line)["text"] + " It was" for line in Path(REVIEWS).read_text().splitlines()]
    encoded = ours.tokenizer(texts)["input_ids"]
    assert encoded == tokenizer(texts)["input_ids"]
    decoder = ours.decoder
    run = jax.jit(lambda params, tokens, mask: decoder.logits(params, decoder.hidden(params, tokens, mask)))
    largest, same, positions = 0.0, 0, 0
    for ids in encoded[:100]:
        tokens, mask = np.zeros((1, WIDTH), np.int32), np.arange(WIDTH)[None] >= WIDTH - len(ids)
        tokens[0, WIDTH - len(ids) :] = ids
        logits = np.asarray(run(ours.params, tokens, mask))[0, WIDTH - len(ids) :]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        largest = max(largest, np.abs(logits - expected).max())
        same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        positions += len(ids)
    assert largest <= 1e-3
    assert same >= 0.99 * positions
