"""A small language model in a folder, and rows of text."""

import json

from tests.models.lm.checkpoints import LLAMA, WORDS, weights, write, write_tokenizer

CONFIG = {**LLAMA, "vocab_size": len(WORDS), "num_hidden_layers": 2, "max_position_embeddings": 96}


def model_folder(folder):
    tensors = {name: 3 * tensor if "norm" not in name else tensor for name, tensor in weights(CONFIG).items()}
    write(folder, CONFIG, tensors)
    write_tokenizer(folder)
    return folder


def reviews(count):
    """Sentences of three to twenty-one words whose label is that of one of them."""
    rows = []
    for number in range(count):
        label = number % 2
        filler = (["the", "film", "was", "very", "fun"] * 4)[: 2 + number % 19]
        rows.append({"text": " ".join([*filler, ("terrible", "great")[label]]), "label": label})
    return rows


def write_rows(folder, rows, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_folder(folder, count=40):
    write_rows(folder, reviews(count), "train")
    write_rows(folder, reviews(20), "validation")
    return folder
