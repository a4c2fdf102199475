"""Accuracy of an exported model in transformers, compared with its accuracy inside its run; needs torch.

    hiso-jax export runs/RUN --format hf --out FOLDER
    python benchmarks/exported_accuracy.py runs/RUN FOLDER

The script handles runs of text-classification without generation: the answer is the most likely of the verbalizer's
words as the next token.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiso_jax import fed


@dataclass
class Arguments:
    """Options of the script.

    Attributes:
      run: directory of the run.
      exported: folder that it was exported to.
      batch: texts evaluated together.
      out: JSON file to write; by default none.
    """

    run: tyro.conf.Positional[Path]
    exported: tyro.conf.Positional[Path]
    batch: int = 16
    out: Path | None = None


def main(arguments: Arguments) -> None:
    ledger = fed.load(arguments.run)
    about, inside = ledger.header["about"], ledger.evaluations[-1].metrics["accuracy"]
    if about["test_rows"] is not None or about["max_length"] is not None:
        raise SystemExit(
            "the run must have been evaluated on all rows, none cut short: without --test-rows, --max-length"
        )
    model = AutoModelForCausalLM.from_pretrained(arguments.exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.exported)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in about["verbalizer"]]
    lines = (Path(about["data_dir"]) / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [tokenizer(about["template"].format(text=row["text"]))["input_ids"] for row in rows]
    right = 0
    # Texts of a batch have similar lengths, so there is little padding. It is on the right, where causal attention does
    # not see it.
    order = sorted(range(len(rows)), key=lambda index: len(texts[index]))
    for begin in range(0, len(rows), arguments.batch):
        chosen = order[begin : begin + arguments.batch]
        last = torch.tensor([len(texts[index]) - 1 for index in chosen])
        tokens = torch.zeros(len(chosen), int(last.max()) + 1, dtype=torch.long)
        for place, index in enumerate(chosen):
            tokens[place, : len(texts[index])] = torch.tensor(texts[index])
        with torch.no_grad():
            logits = model(tokens).logits[torch.arange(len(chosen)), last][:, words]
        labels = torch.tensor([rows[index]["label"] for index in chosen])
        right += int((logits.argmax(1) == labels).sum())
    report = {"rounds": len(ledger.rows), "examples": len(rows), "inside": inside, "transformers": right / len(rows)}
    print(json.dumps(report))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__.split("\n")[0]))
