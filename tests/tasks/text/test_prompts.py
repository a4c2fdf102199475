"""The exact prompts and answer words of the authors, and the functions that read them."""

import pytest

from hiso_jax.tasks.text.prompts import PROMPTS, SOURCES, prompt_for, user_prompt

ROW = {
    "sentence": "a fine film", "question1": "Q1", "question2": "Q2", "passage": "P", "question": "Q",
    "premise": "It rains.", "hypothesis": "It is wet", "paragraph": "Pa", "answer": "A", "word": "bank",
    "sentence1": "S1", "sentence2": "S2", "text": "T", "span1_text": "Mark", "span2_text": "He", "title": "Ti",
    "context": "C", "document": "D", "answers": {"text": ["one", "two"]}, "answers_spans": {"spans": ["3", "4"]},
    "summary": "short",
}  # fmt: skip
DECOMFL = {
    "sst2": ("a fine film It was", (" bad", " good")),
    "qqp": (
        "Question 1: Q1\n Question 2: Q2\n Are they semantically equivalent? Yes or No?\n",
        (" No", " Yes"),
    ),
    "boolq": ("P\nQuestion: Q\nIs that correct? Yes or No?\n", ("No", "Yes")),
    "rte": ('It rains.\nDoes this mean that "It is wet" is true? Yes or No?\n', ("Yes", "No")),
    "multirc": ('Pa\nQuestion: Q\nI found this answer "A". Is that correct? Yes or No?\n', ("No", "Yes")),
    "cb": ('Suppose It rains. Can we infer that "It is wet"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe")),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nS1\nS2\n',
        ("No", "Yes"),
    ),
    "wsc": (
        'T\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        ("No", "Yes"),
    ),
    "squad": ("Title: Ti\nContext: C\nQuestion: Q\nAnswer concisely in a few words:", ()),
    "drop": ("Passage: P\nQuestion: Q\nAnswer:", ()),
    "xsum": ("Document: D\nSummarize this in one sentence:", ()),
}
MEZO = {
    "sst2": ("a fine film It was", (" terrible", " great")),
    "boolq": ("P Q?\n", ("No", "Yes")),
    "squad": ("Title: Ti\nContext: C\nQuestion: Q\nAnswer:", ()),
    "drop": ("Passage: P\nQuestion: Q\nAnswer:", ()),
}


@pytest.mark.parametrize(
    ("prompts", "task", "expected"),
    [("decomfl", *item) for item in DECOMFL.items()] + [("mezo", *item) for item in MEZO.items()],
)
def test_prompts_are_the_authors_to_the_letter(prompts, task, expected):
    prompt = prompt_for(task, prompts)
    assert (prompt.render(ROW), prompt.words) == expected
    if not prompt.words:
        assert prompt.answers(ROW)[0] in ("one", "3", "short")
        assert prompt.answer_template == (" {answer}\n" if prompts == "mezo" else "{answer}")


def test_every_task_has_a_source_and_columns():
    assert set(PROMPTS["decomfl"]) == set(SOURCES)
    assert prompt_for("wsc", "decomfl").columns == ("text", "span1_text")
    with pytest.raises(ValueError, match="prompts must be decomfl for qqp"):
        prompt_for("qqp", "mezo")


@pytest.mark.parametrize(
    ("template", "words", "sentence"),
    [
        ("It was", (" a", " b"), "template must name a column"),
        ("{text", (" a", " b"), "template must be text with columns in braces"),
        ("{} is", (" a", " b"), "template must name a column"),
        ("{text} is", (" a",), "verbalizer must be at least two different words"),
        ("{text} is", (" a", " a"), "verbalizer must be at least two different words"),
    ],
)
def test_a_prompt_that_cannot_be_is_one_sentence(template, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        user_prompt(template, words)
