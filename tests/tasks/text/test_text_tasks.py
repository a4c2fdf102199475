"""Text tasks on a small language model: encoding, buckets, losses, metrics, generated answers and data."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax
from hiso_jax import fed
from hiso_jax.models import lm
from hiso_jax.models.lm.trainable import tune
from hiso_jax.tasks.text import answers, text_data, text_task, token_scores
from hiso_jax.tasks.text.encode import buckets_for, tokenize, truncate
from hiso_jax.tasks.text.scores import exact_match, macro_f1, rouge, token_f1
from tests.marks import slow, thorough
from tests.models.lm.checkpoints import WORDS
from tests.tasks.text.problems import data_folder, model_folder, reviews, write_rows


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return lm.load(model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def task(pretrained, tmp_path_factory):
    return classification(pretrained, data_folder(tmp_path_factory.mktemp("data")))


RUN = jax.jit(
    lambda decoder, params, tokens, mask: decoder.logits(params, decoder.hidden(params, tokens, mask)), static_argnums=0
)


def all_logits(pretrained, ids):
    """The scores of every token after every position of one text, padded to one length on its right."""
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, : len(ids)] = ids
    mask = np.arange(48)[None] < len(ids)
    return np.asarray(RUN(pretrained.decoder, pretrained.params, tokens, mask))[0, : len(ids)]


def classification(pretrained, folder, trainable="all", **settings):
    known = {"template": "{text} It was", "verbalizer": (" bad", " good")} | settings
    return text_task("text-classification", tune(pretrained, trainable), pretrained, data_dir=folder, **known)


@given(st.lists(st.integers(5, 50), min_size=1, max_size=30), st.integers(1, 40), st.booleans())
def test_truncation_keeps_the_first_token_and_the_end(ids, limit, has_bos):
    ids = [0, *ids] if has_bos else ids
    kept = truncate(ids, limit, 0)
    assert len(kept) == min(len(ids), limit)
    if len(ids) > limit > 1:
        assert kept[0] == 0 if has_bos else kept == ids[-limit:]
        assert kept[-1] == ids[-1]


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), slack=st.integers(0, 50))
def test_buckets_are_few_and_fit(lengths, slack):
    buckets = buckets_for(lengths, max(lengths) + slack)
    assert 1 <= len(buckets) <= 5
    assert list(buckets) == sorted(set(buckets))
    assert max(lengths) <= buckets[-1] <= max(lengths) + slack or buckets[-1] in (max(lengths), max(lengths) + slack)


@pytest.mark.thorough
def test_what_is_read_is_the_last_position_and_the_words(task, pretrained):
    batch = jax.tree.map(lambda a: jnp.asarray(a[:12]), dict(task.train))
    ours = jax.jit(task.logits)(task.init(None), batch)
    columns = [WORDS.index("bad"), WORDS.index("good")]
    assert batch["tokens"].shape[1] > max(batch["length"])
    for number, row in enumerate(reviews(12)):
        ids = pretrained.tokenizer(f"{row['text']} It was")["input_ids"]
        assert ids[0] == WORDS.index("<s>")
        assert batch["length"][number] == len(ids)
        np.testing.assert_allclose(ours[number], all_logits(pretrained, ids)[-1, columns], atol=1e-4)


@pytest.mark.thorough
def test_buckets_and_groups_change_nothing(task):
    assert task.buckets == (16, 32)
    batch = jax.tree.map(lambda a: jnp.asarray(a[:16]), dict(task.train))
    assert batch["length"].min() <= task.buckets[0] < batch["length"].max()
    one = dataclasses.replace(task, buckets=task.buckets[-1:])
    params = task.init(None)
    np.testing.assert_allclose(jax.jit(task.loss)(params, batch), jax.jit(one.loss)(params, batch), atol=1e-5)
    # With one batch for each client, too, the choice of a length stays a branch of the program.
    clients = jax.tree.map(lambda a: a.reshape(2, 8, *a.shape[1:]), batch)
    apart = jax.jit(jax.vmap(task.loss, (None, 0)))(params, clients)
    np.testing.assert_allclose(apart.reshape(-1), jax.jit(task.loss)(params, batch), atol=1e-5)
    program = jax.jit(jax.vmap(task.loss, (None, 0))).lower(params, clients).as_text()
    assert "stablehlo.case" in program


@pytest.mark.thorough
@pytest.mark.parametrize("trainable", ["lora", slow("all")])
def test_fine_tuning_learns_and_replays(pretrained, tmp_path, trainable):
    task = classification(pretrained, data_folder(tmp_path), trainable)
    tx = hiso_jax.hiso(0.004 if trainable == "all" else 0.01)
    config = fed.SimulationConfig(rounds=150, cohort=2, perturbations=4, batch_size=16, eval_every=150)
    result = fed.Simulation(task, tx, fed.iid(40, 4), config).run()
    before, after = (row.metrics for row in (result.metrics[0], result.metrics[-1]))
    assert set(after) == {"loss", "accuracy", "macro_f1"}
    assert after["loss"] < before["loss"] - 0.05
    assert result.diverged_at is None
    params, _ = fed.replay(result.initial_params, tx, result.records)
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    assert (task.frozen is None) == (trainable == "all")


def test_tuning_holds_examples_out(task):
    part = task.hold_out(10, seed=1)
    assert (len(part.train["label"]), len(part.test["label"])) == (30, 10)
    assert (np.diff(part.test["length"]) >= 0).all()


QUESTIONS = [
    {"title": "sky", "context": "the sky is blue", "question": "what is the color of the sky ?",
     "answers": {"text": ["blue", "the blue"]}},
    {"title": "film", "context": "the film was red", "question": "what was the film ?", "answers": {"text": ["red"]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def answering(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    write_rows(folder, QUESTIONS * 4, "train")
    write_rows(folder, QUESTIONS, "validation")
    return text_task(
        "squad", tune(pretrained), pretrained, data_dir=folder, prompts="mezo", max_length=64, max_new_tokens=4
    )


def test_a_generation_loss_reads_the_answer_s_tokens(answering, pretrained):
    assert answering.answer_length == 2
    batch = jax.tree.map(lambda a: jnp.asarray(a[:2]), dict(answering.train))
    losses = jax.jit(answering.loss)(answering.init(None), batch)
    for loss, row in zip(losses, QUESTIONS, strict=True):
        prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question']}\nAnswer:"
        ids = pretrained.tokenizer(prompt)["input_ids"]
        answer = [WORDS.index(row["answers"]["text"][0]), WORDS.index("\n")]
        scores = jax.nn.log_softmax(all_logits(pretrained, ids + answer))[len(ids) - 1 : -1]
        np.testing.assert_allclose(loss, -np.mean([scores[i, token] for i, token in enumerate(answer)]), atol=1e-4)


@pytest.mark.thorough
def test_generated_answers_are_scored_against_every_golden_one(answering):
    data = jax.tree.map(jnp.asarray, dict(answering.test))
    outputs = jax.tree.map(np.asarray, dict(jax.jit(answering.metrics)(answering.init(None), data)))
    assert outputs["generated"].shape == (2, 4)
    scores = answering.summarise(outputs)
    assert set(scores) == {"loss", "exact_match", "f1"}
    blue, red, the = (WORDS.index(word) for word in ("blue", "red", "the"))
    end = WORDS.index("</s>")
    said = {0: [the, blue, end, end], 1: [blue, red, end, end]}
    outputs["generated"] = np.array([said[row] for row in outputs["row"]])
    scores = answering.summarise(outputs)
    assert scores["exact_match"] == 0.5
    np.testing.assert_allclose(scores["f1"], (1 + 2 / 3) / 2)


@pytest.mark.slow
def test_fine_tuning_learns_to_answer(answering):
    config = fed.SimulationConfig(rounds=100, cohort=2, perturbations=4, batch_size=4, eval_every=100)
    result = fed.Simulation(answering, hiso_jax.hiso(0.003), fed.iid(8, 2), config).run()
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"] - 0.1


def test_scores():
    assert exact_match("The Blue!", ["red", "blue"]) == 1
    assert token_f1("a very blue sky", ["blue sky", "red"]) == pytest.approx(0.8)
    assert token_f1("", ["red"]) == 0
    labels, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    assert macro_f1(predicted, labels, 3) == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    scores = rouge(["the cat sat"], [["the cat sat down", "a dog"]])
    assert scores["rouge1"] == pytest.approx(6 / 7)
    assert scores["rouge2"] == pytest.approx(4 / 5)
    assert set(scores) == {"rouge1", "rouge2", "rougeL"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_local_files_of_every_kind_are_the_same_data(ending, pretrained, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(reviews(6))
    for split in ("train", "test"):
        path = str(tmp_path / f"{split}.{ending}")
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[ending](path)
    task = classification(pretrained, tmp_path)
    assert task.train["label"].tolist() == [0, 1] * 3


def test_label_names_are_numbered_alike_in_all_splits(pretrained, tmp_path):
    for split, names in (("train", ("pos", "neg", "neutral")), ("validation", ("pos", "neutral"))):
        write_rows(tmp_path, [{"text": "film", "label": name} for name in names], split)
    task = classification(pretrained, tmp_path, verbalizer=(" bad", " dull", " good"))
    assert task.train["label"].tolist() == [2, 0, 1]
    assert sorted(task.test["label"].tolist()) == [1, 2]
    with pytest.raises(ValueError, match="one word for each of the 3 labels neg, neutral, pos"):
        classification(pretrained, tmp_path)


def test_labels_say_which_word_stands_for_which(pretrained):
    """Rows in memory have labels in alphabetical order: with ' good, bad' this would train the inverse."""
    rows = [{"text": "film", "label": name} for name in ("pos", "neg")]
    rows = {"train": rows, "test": rows}
    words = {"template": "{text} It was", "verbalizer": (" good", " bad")}
    data = text_data("text-classification", rows=rows, **words)
    assert (data.label_words, [row["label"] for row in data.rows["train"]]) == ("neg is ' good', pos is ' bad'", [1, 0])
    data = text_data("text-classification", rows=rows, labels=("pos", "neg"), **words)
    assert (data.label_words, [row["label"] for row in data.rows["train"]]) == ("pos is ' good', neg is ' bad'", [0, 1])
    assert text_task(data, tune(pretrained), pretrained).train["label"].tolist() == [0, 1]
    for labels, sentence in [
        (("pos", "good"), "row 2 of train has label 'neg'; it must be one of pos, good"),
        (("pos",), "labels must be 2 different ones"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            text_data("text-classification", rows=rows, labels=labels, **words)


@pytest.mark.parametrize("rows", ["datasets", "splits"])
def test_rows_of_the_datasets_library_are_taken(rows):
    import datasets

    split = datasets.Dataset.from_list([{"text": "film", "label": 1}, {"text": "film", "label": 0}])
    given = {"train": split, "test": split} if rows == "splits" else datasets.DatasetDict(train=split, validation=split)
    data = text_data("text-classification", rows=given, template="{text} It was", verbalizer=(" bad", " good"))
    assert [row["label"] for row in data.rows["test"]] == [1, 0]
    with pytest.raises(ValueError, match=r"rows must be .* there is no train"):
        text_data("text-classification", rows=split, template="{text} It was", verbalizer=(" bad", " good"))


def test_a_user_s_words_may_replace_the_task_s(pretrained, tmp_path):
    row = {"text": "the film", "span1_text": "film", "span2_text": "It", "label": 1}
    for split in ("train", "validation"):
        write_rows(tmp_path, [row, row], split)
    task = text_task(
        "wsc", tune(pretrained), pretrained, data_dir=tmp_path, verbalizer=(" bad", " good"), max_length=64
    )
    assert task.words == (WORDS.index("bad"), WORDS.index("good"))


@pytest.mark.parametrize(
    ("damage", "settings", "sentence"),
    [
        ({"text": "x"}, {}, "validation"),
        (None, {"template": "{review} It was"}, "data_dir must hold the columns review, label; train lacks review"),
        (None, {"verbalizer": (" bad", " bad")}, "verbalizer must be at least two different words"),
        (None, {"verbalizer": (" splendid", " bad")}, None),
        (None, {"verbalizer": (" unknown", " splendid")}, "verbalizer must be words that end in different tokens"),
        (None, {"template": "{text:>999999999} It was"}, "template must name columns alone in its braces"),
        (None, {"template": "{text.real} It was"}, "template must name a column in braces"),
        ("", {}, "train.jsonl is empty"),
        (None, {"max_length": 97}, "max_length must be between 1 and the model's 96 positions, got 97"),
        (None, {"template": None}, "template must be given for text-classification"),
        ({"text": "x", "label": 2}, {}, "row 41 of train has label 2; it must be one of 0, 1"),
        ({"text": None, "label": 1}, {}, "row 41 of train has no text"),
        ("{broken", {}, "train.jsonl cannot be read"),
    ],
)
def test_bad_data_is_one_sentence(damage, settings, sentence, pretrained, tmp_path):
    folder = data_folder(tmp_path)
    if isinstance(damage, str):
        (folder / "train.jsonl").write_text(damage)
    elif damage is not None and "label" in damage:
        write_rows(folder, [*reviews(40), damage], "train")
    elif damage is not None:
        (folder / "validation.jsonl").unlink()
    if sentence is None:
        assert classification(pretrained, folder, **settings).words == (2, 6)
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        classification(pretrained, folder, **settings)
    assert "\n" not in str(caught.value)


def test_hub_data_is_loaded_by_name(pretrained, monkeypatch):
    """Real datasets objects with the hub's columns; only the download is replaced."""
    import datasets

    rows = [{"sentence": row["text"], "label": row["label"]} for row in reviews(8)]
    asked = []

    def load_dataset(name, config=None, data_dir=None, revision=None):
        asked.append((name, config or data_dir, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "validation")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = text_task("sst2", tune(pretrained), pretrained, train_rows=5, seed=1)
    assert asked == [("nyu-mll/glue", "sst2", None), ("nyu-mll/glue", "sst2", "refs/convert/parquet")]
    assert (len(task.train["label"]), len(task.test["label"])) == (5, 8)
    assert task.target == 0.85

    def out_of_reach(*arguments, **settings):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    with pytest.raises(ValueError, match=r"data_dir must name a folder .* loading nyu-mll/glue gave ConnectionError"):
        text_task("sst2", tune(pretrained), pretrained)


@pytest.mark.parametrize("trainable", [thorough("all"), "lora"])
def test_answers_are_those_that_the_task_scores(pretrained, trainable, tmp_path):
    task, words = classification(pretrained, data_folder(tmp_path), trainable), [" bad", " good"]
    prompts = [f"{row['text']} It was" for row in reviews(20)]
    params = jax.tree.map(lambda x: jnp.asarray(x) + 0.01, task.init(jax.random.key(0)))
    found = answers(pretrained, prompts, words, tuned=(task.model, params))
    frozen = jax.tree.map(jnp.asarray, task.frozen)
    best = np.asarray(task.logits(params, jax.tree.map(jnp.asarray, task.test), frozen)).argmax(1)
    # A split has its own order of rows.
    rows = zip(task.test["tokens"], task.test["length"], best, strict=True)
    scored = {tuple(tokens[-length:].tolist()): words[number] for tokens, length, number in rows}
    assert found == [scored[tuple(ids)] for ids in tokenize(pretrained.tokenizer, prompts)]
    assert len(set(found)) == 2
    # Any number of prompts, one by one too.
    assert answers(pretrained, prompts[:3], words) == [answers(pretrained, [each], words)[0] for each in prompts[:3]]
    assert answers(pretrained, [], words) == []


@pytest.mark.parametrize(
    ("prompts", "words", "sentence"),
    [
        ("a film It was", [" bad"], "prompts must be a list of texts"),
        (["a film It was"], [], "words must be at least one"),
        (["a film It was"], [" bad", " bad"], "words that end in different tokens"),
    ],
)
def test_what_has_no_answer_is_refused(pretrained, prompts, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        answers(pretrained, prompts, words)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=5, max_size=5),
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=4, max_size=4),
)
def test_scores_of_tokens_are_those_of_bags_and_lists(generated, golden):
    arrays = [jnp.array([column]) for pairs in (generated, golden) for column in zip(*pairs, strict=True)]
    ours, theirs = ([token for token, counts in pairs if counts] for pairs in (generated, golden))
    shared = sum((Counter(ours) & Counter(theirs)).values())
    f1 = 2 * shared / (len(ours) + len(theirs)) if ours or theirs else 1.0
    assert float(token_scores.token_f1(*arrays)[0]) == pytest.approx(f1)
    assert bool(token_scores.exact_match(*arrays)[0]) == (ours == theirs)


@pytest.mark.thorough
def test_generated_tokens_are_scored_in_the_program_for_training_examples_too(answering):
    train = jax.tree.map(lambda a: jnp.asarray(a[:2]), dict(answering.train))
    outputs = jax.tree.map(np.asarray, dict(jax.jit(answering.metrics)(answering.init(None), train)))
    # The prompts in front of the answers are those of the same test rows.
    test = jax.tree.map(jnp.asarray, dict(answering.test))
    other = jax.tree.map(np.asarray, dict(jax.jit(answering.metrics)(answering.init(None), test)))
    order = np.argsort(other["row"])
    np.testing.assert_array_equal(outputs["generated"], other["generated"][order])
    np.testing.assert_array_equal(outputs["f1"], other["f1"][order])
    assert "row" not in outputs


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["f1", "exact_match"])
def test_a_run_can_maximise_a_score_of_what_is_generated(answering, pretrained, name):
    config = fed.SimulationConfig(rounds=2, cohort=2, perturbations=2, batch_size=2, eval_every=2, mu=0.5)
    adapted = tune(pretrained, "lora")
    # Models are read from files as arrays of NumPy.
    adapted = dataclasses.replace(adapted, frozen=jax.tree.map(np.asarray, adapted.frozen))
    task = fed.maximise(dataclasses.replace(answering, model=adapted), name)
    result = fed.Simulation(task, hiso_jax.decomfl(0.1), fed.iid(8, 2), config).run()
    assert set(result.metrics[-1].metrics) == {"loss", "exact_match", "f1"}
    assert -1 <= result.metrics[-1].train_loss <= 0


@pytest.mark.thorough
def test_a_run_can_maximise_the_accuracy_of_a_language_model(task):
    config = fed.SimulationConfig(rounds=2, cohort=2, perturbations=2, batch_size=8, eval_every=2, mu=0.5)
    result = fed.Simulation(fed.maximise(task, "accuracy"), hiso_jax.decomfl(0.1), fed.iid(40, 4), config).run()
    assert set(result.metrics[-1].metrics) == {"loss", "accuracy", "macro_f1"}
    assert -1 <= result.metrics[-1].train_loss <= 0
