"""Conversations: the chat template's prompts, the loss of the answers alone, and runs of them."""

import json

import datasets
import jax
import numpy as np
import pytest

from hiso_jax import Experiment, fed
from hiso_jax.checks import ParameterError
from hiso_jax.experiment import notes
from hiso_jax.models import lm
from hiso_jax.tasks.text import text_task
from tests.fed.problems import assert_trees_identical
from tests.tasks.text.problems import model_folder
from tests.tasks.text.test_text_tasks import all_logits

# A user's message ends with a colon, and an answer with the end of text.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}<s>{{ m['content'] }} :{% endif %}{% endfor %}"
)


def message(role, content):
    return {"role": role, "content": content}


SHORT = [message("user", "the film was fun"), message("assistant", "great")]
LONG = [
    message("system", "it was"),
    message("user", "the film"),
    message("assistant", "was terrible"),
    message("user", "very"),
    message("assistant", "very great fun"),
]


def with_template(folder, template=TEMPLATE):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_template(model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pretrained(folder):
    return lm.load(folder)


def task_of(pretrained, *conversations, **given):
    rows = [{"messages": messages} for messages in conversations]
    return text_task(
        "chat", lm.tune(pretrained), pretrained, rows={"train": rows, "test": rows}, max_new_tokens=6, **given
    )


def test_every_answer_is_an_example_whose_prompt_is_all_before_it(pretrained):
    task, read = task_of(pretrained, SHORT, LONG), pretrained.tokenizer
    texts = [
        ("<s>the film was fun :", " great</s>"),
        ("<s>it was :<s>the film :", " was terrible</s>"),
        ("<s>it was :<s>the film : was terrible</s><s>very :", " very great fun</s>"),
    ]
    assert len(task.train["length"]) == len(texts)
    for tokens, length, answer, (prompt, end) in zip(
        task.train["tokens"], task.train["length"], task.train["answer"], texts, strict=True
    ):
        prompt_ids, end_ids = (read(text, add_special_tokens=False)["input_ids"] for text in (prompt, end))
        assert tokens[len(tokens) - length :].tolist() == prompt_ids + end_ids
        assert answer == len(end_ids)
    assert sorted(map(str, task.golden)) == sorted(map(str, [("great",), ("was terrible",), ("very great fun",)]))
    assert task.stop_tokens == (read.eos_token_id,)
    assert task.metric == "loss"


def test_the_loss_is_that_of_the_answer_alone(pretrained):
    task = task_of(pretrained, SHORT, LONG)
    found = np.asarray(jax.jit(task.loss)(task.init(None), task.train))
    for row, loss in enumerate(found):
        length, answer = int(task.train["length"][row]), int(task.train["answer"][row])
        ids = task.train["tokens"][row][-length:].tolist()
        logits = all_logits(pretrained, ids).astype(np.float64)
        log_p = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        expected = -np.mean([log_p[place - 1, ids[place]] for place in range(length - answer, length)])
        assert loss == pytest.approx(expected, rel=1e-4)


def test_it_is_told_how_many_were_cut(pretrained):
    task = task_of(pretrained, SHORT, LONG, max_length=8)
    # Prompts of 6, 7 and 13 tokens before answers of 2, 3 and 4: only the first fits into 8.
    assert task.cut == (2, 0)
    (said,) = notes(task, fed.iid(3, 1))
    assert said == (
        "to fit --max-length and --max-new-tokens, 2 training prompts lost their beginning and 0 answers their end"
    )
    assert task_of(pretrained, SHORT, LONG).cut == (0, 0)


def write(folder, conversations):
    folder.mkdir()
    for name in ("train", "validation"):
        lines = [json.dumps({"messages": messages}) for messages in conversations]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_columns_of_datasets_and_parquet_are_those_of_rows(pretrained, tmp_path):
    expected = task_of(pretrained, SHORT, LONG)
    rows = datasets.Dataset.from_list([{"messages": SHORT}, {"messages": LONG}])
    for name in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    for given in ({"rows": {"train": rows, "test": rows}}, {"data_dir": tmp_path}):
        task = text_task("chat", lm.tune(pretrained), pretrained, max_new_tokens=6, **given)
        np.testing.assert_array_equal(np.sort(task.train["length"]), np.sort(expected.train["length"]))
        assert sorted(task.golden) == sorted(expected.golden)


@pytest.mark.thorough
def test_a_run_learns_to_answer_and_replays(folder, tmp_path):
    data = write(tmp_path / "data", [SHORT, LONG] * 6)
    experiment = Experiment(
        task="chat", model=str(folder), data_dir=data, trainable="all", algorithm="mosaic", learning_rate=0.01,
        rounds=6, eval_every=6, clients=3, cohort=3, batch_size=4, max_new_tokens=6,
    )  # fmt: skip
    result = experiment.run(tmp_path / "run")
    assert set(result.metrics[0].metrics) == {"loss", "exact_match", "f1"}
    assert result.metrics[-1].metrics["loss"] < result.metrics[0].metrics["loss"]
    replayed, _ = fed.replay(result.initial_params, experiment.algorithm, result.records)
    assert_trees_identical(replayed, result.params)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "has no message of the assistant"),
        ([message("user", "very")], "row 1 of train has no message of the assistant behind another"),
        ([message("assistant", "very")], "row 1 of train has no message of the assistant behind another"),
        ([*SHORT, {"role": "user"}], "row 1 of train has a message that is not"),
        ([*SHORT[:1], message("assistant", "  ")], "answer 1 of train is empty"),
    ],
)
def test_messages_of_another_form_are_refused(pretrained, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        task_of(pretrained, messages)


def test_a_template_is_needed_that_writes_answers_behind_prompts(tmp_path):
    plain = lm.load(model_folder(tmp_path / "plain"))
    with pytest.raises(ParameterError, match="model must come with a chat template that takes these messages"):
        task_of(plain, SHORT)
    backwards = "{% for m in messages|reverse %}{{ m['content'] }} :{% endfor %}"
    odd = lm.load(with_template(model_folder(tmp_path / "odd"), backwards))
    with pytest.raises(ParameterError, match="writes an answer behind its prompt"):
        task_of(odd, SHORT)
