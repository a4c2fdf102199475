"""Text, labels and tokenizers as users have them: they are read correctly, or refused in one sentence."""

import gzip
import json
import types

import numpy as np
import pandas as pd
import pytest

import hiso_jax
from hiso_jax.tasks.text import text_data
from hiso_jax.tasks.text.encode import last_tokens, tokenize
from hiso_jax.tasks.text.generation import TextGeneration

WORDS = {"template": "{text} is", "verbalizer": (" bad", " good")}


def data_of(rows, **changes):
    return text_data("text-classification", rows={"train": rows, "test": rows}, **{**WORDS, **changes})


def labels_of(*labels, **changes):
    return [
        row["label"] for row in data_of([{"text": "x", "label": label} for label in labels], **changes).rows["train"]
    ]


def test_labels_of_other_libraries_are_numbers_or_text():
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.array([1, 0], "Int64")})
    assert [row["label"] for row in data_of(frame.to_dict("records")).rows["train"]] == [1, 0]
    assert labels_of(np.int64(1), np.uint8(0)) == [1, 0]
    assert labels_of(1.0, 0.0) == [1, 0]
    assert labels_of(np.str_("yes"), "no") == [1, 0]
    assert labels_of(b"yes", b"no") == [1, 0]


@pytest.mark.parametrize("label", ["", "  ", None, float("nan"), np.float32("nan")])
def test_a_row_without_a_label_is_refused(label):
    with pytest.raises(ValueError, match="row 2 of train has no label"):
        labels_of("yes", label, "no")


def test_numbers_in_quotes_are_in_the_order_of_the_numbers():
    names = tuple(map(str, range(11)))
    data = data_of(
        [{"text": "x", "label": name} for name in reversed(names)], verbalizer=[f" w{name}" for name in names]
    )
    assert data.labels == names
    assert "10 is ' w10'" in data.label_words


def test_a_verbalizer_may_name_its_labels():
    chosen = {"positive": " good", "negative": " bad"}
    data = data_of([{"text": "x", "label": each} for each in ("negative", "positive")], verbalizer=chosen)
    assert (data.prompt.words, data.labels) == ((" good", " bad"), ("positive", "negative"))
    assert [row["label"] for row in data.rows["train"]] == [1, 0]
    assert labels_of(1, 0, verbalizer={1: " good", 0: " bad"}) == [0, 1]
    with pytest.raises(ValueError, match="labels must not be given beside a verbalizer that names them"):
        labels_of(1, 0, verbalizer={1: " good", 0: " bad"}, labels=("0", "1"))
    assert labels_of(True, False, verbalizer={False: " no", True: " yes"}) == [1, 0]
    assert labels_of(1, 0, verbalizer={0.0: " no", 1.0: " yes"}) == [1, 0]
    for words in (" bad, good", {" bad", " good"}, {"a": 0, "b": 1}, [" bad", None]):
        with pytest.raises(ValueError, match="verbalizer must be a list of words"):
            labels_of(1, 0, verbalizer=words)
    with pytest.raises(ValueError, match="labels must be a list, one for each word"):
        labels_of(1, 0, labels="01")
    assert labels_of(1, 0, labels=[1, 0]) == [0, 1]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (float("nan"), "row 1 of train has no text"),
        (["a", "b"], "row 1 of train has a text that is neither text nor a number, but a list"),
        (b"\xff\xfe", "row 1 of train has a text that is no text: its bytes are not UTF-8"),
    ],
)
def test_a_cell_that_is_no_text_is_refused(cell, said):
    with pytest.raises(ValueError, match=said):
        data_of([{"text": cell, "label": 0}])


def test_bytes_are_text_and_numbers_stay_numbers():
    data = data_of([{"text": "café".encode(), "label": 0}, {"text": np.int64(3), "label": 1}])
    assert [data.prompt.render(row) for row in data.rows["train"]] == ["café is", "3 is"]


LINES = '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n'
CSV = "text,label\na,1\nb,0\n"


def parquet(path, rows):
    import pyarrow
    from pyarrow import parquet as files

    path.parent.mkdir(exist_ok=True)
    files.write_table(pyarrow.table({name: [row[name] for row in rows] for name in rows[0]}), path)


@pytest.mark.parametrize(
    ("train", "test", "content"),
    [
        ("train.jsonl.gz", "validation.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("train.csv.gz", "dev.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("train.tsv", "test.tsv", CSV.replace(",", "\t").encode()),
        ("Train.CSV", "Valid.csv", CSV.encode()),
        ("data/train.jsonl", "data/val.jsonl", LINES.encode()),
    ],
)
def test_files_are_found_as_they_are_named_elsewhere(train, test, content, tmp_path):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = text_data("text-classification", data_dir=tmp_path, **WORDS)
    assert [(row["text"], row["label"]) for row in data.rows["train"]] == [("a", 1), ("b", 0)]


def test_parts_are_one_split_in_their_order(tmp_path):
    for split, rows in (("train", "abc"), ("validation", "d")):
        for place, text in enumerate(rows):
            parquet(
                tmp_path / "data" / f"{split}-{place:05}-of-{len(rows):05}.parquet",
                [{"text": text, "label": place % 2}],
            )
    data = text_data("text-classification", data_dir=tmp_path, **WORDS)
    assert [row["text"] for row in data.rows["train"]] == ["a", "b", "c"]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="data_dir must hold all 3 parts of train-00000-of-00003"):
        text_data("text-classification", data_dir=tmp_path, **WORDS)


def test_a_folder_without_a_split_says_what_it_has_and_what_would_do(tmp_path):
    for name in ("training.jsonl", "notes.txt"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(ValueError, match=r"train\.jsonl, \.csv, \.tsv or \.parquet.* has notes\.txt, training\.jsonl"):
        text_data("text-classification", data_dir=tmp_path, **WORDS)


def test_a_folder_of_save_to_disk_is_named_for_what_it_is(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a", "label": 0}])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"data_dir must hold .* was written by save_to_disk: load it with"):
        text_data("text-classification", data_dir=tmp_path, **WORDS)


def test_quotes_in_tabbed_files_are_quotes_or_text(tmp_path):
    paired = 'text\tlabel\n"a\tb"\t1\n"c ""d"""\t0\n'
    stray = 'text\tlabel\nsay "a\t1\n6" nails\t0\n'
    for text, found in ((paired, ["a\tb", 'c "d"']), (stray, ['say "a', '6" nails'])):
        for split in ("train", "validation"):
            (tmp_path / f"{split}.tsv").write_text(text)
        rows = text_data("text-classification", data_dir=tmp_path, **WORDS).rows["train"]
        assert [row["text"] for row in rows] == found


def test_a_damaged_archive_is_one_sentence(tmp_path):
    whole = gzip.compress((LINES * 50).encode())
    for content in (whole[:-20], b"no archive", whole[:20] + b"\0" * 30):
        (tmp_path / "train.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be read"):
            text_data("text-classification", data_dir=tmp_path, **WORDS)


# ---------------------------------------------------------------- tokenizers


def sentencepiece_like():
    """A tokenizer whose words begin with a blank, "▁Yes", unless a line break stands before them."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("YesNogdbaf\n▁"))
    vocabulary = {token: place for place, token in enumerate(["<unk>", *letters, "▁Yes", "▁No", "Yes", "No", "▁good"])}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o"), ("▁", "Yes"), ("▁", "No"), ("g", "o"), ("go", "o"), ("goo", "d")]
    for a, b in merges:
        vocabulary.setdefault(a + b, len(vocabulary))
    merges.append(("▁", "good"))
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_word_is_read_by_the_token_that_it_has_behind_its_prompt():
    tokenizer = sentencepiece_like()

    def name(token):
        return tokenizer.convert_ids_to_tokens(token)

    assert [name(token) for token in last_tokens(tokenizer, ("No", "Yes"), ["good\n"])] == ["No", "Yes"]
    assert [name(token) for token in last_tokens(tokenizer, (" No", " Yes"), ["good"])] == ["▁No", "▁Yes"]
    # The token that is read is the last one of the whole text.
    for prompt, word in (("good\n", "Yes"), ("good", " Yes")):
        whole = tokenizer(prompt + word)["input_ids"][-1]
        assert last_tokens(tokenizer, (word, word.replace("Yes", "No")), [prompt])[0] == whole
    with pytest.raises(ValueError, match="template must end so that the words"):
        last_tokens(tokenizer, ("No", "Yes"), ["good\n", "good "])


def test_the_end_that_a_tokenizer_puts_behind_a_text_is_left_out():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "it": 3, "was": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for template in ("<s> $A", "<s> $A </s>", "$A </s> </s>"):
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        begin = [0] if template.startswith("<s>") else []
        assert tokenize(tokenizer, ["it was", ""]) == [[*begin, 3, 4], begin]


def test_what_fills_an_answer_up_is_no_part_of_it():
    """A tokenizer that names neither a padding nor an end token fills with token 0, which is a word."""
    words = ["of", "paris", "is", "\n"]
    decoded = types.SimpleNamespace(
        batch_decode=lambda rows, skip_special_tokens: [" ".join(words[token] for token in row) for row in rows]
    )
    task = types.SimpleNamespace(stop_tokens=(3,), tokenizer=decoded, scoring="span")
    generated = np.array([[1, 3, 0, 0], [1, 2, 1, 2], [3, 0, 0, 0]])
    assert TextGeneration.answers(task, generated) == ["paris", "paris is paris is", ""]


def test_the_planned_width_of_generation_is_that_of_a_run():
    from hiso_jax.models import lm
    from hiso_jax.tasks.text import text_shapes

    config = lm.SHAPES["opt-125m"]
    model = lm.tuned_shapes(lm.Decoder(config), "all")
    for given, width in (({"max_length": 64, "max_new_tokens": 32}, 64), ({}, config.max_positions)):
        assert text_shapes("squad", model, **given).train["tokens"].shape[1] == width
    # A plan refuses the same lengths as a run.
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1 and below `max_length`, 32, got 32"):
        text_shapes("squad", model, max_length=32)
    with pytest.raises(ValueError, match="max_length must be between 1 and the model's 2048 positions, got 4096"):
        text_shapes("sst2", model, max_length=4096)


def test_a_row_may_name_its_client_by_a_number_of_numpy():
    rows = [{"text": "x", "label": place % 2, "who": np.int64(place // 2)} for place in range(4)]
    data = data_of(rows, client_column="who")
    assert data.clients.tolist() == [0, 0, 1, 1]
    assert json.dumps(data.clients.tolist())


@pytest.mark.parametrize("of", [pd.DataFrame, lambda rows: pd.DataFrame(rows).to_dict("list")])
def test_rows_are_also_tables_and_columns(of):
    rows = {"train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test": [{"text": "c", "label": 1}]}
    expected = text_data("text-classification", rows=rows, **WORDS).rows
    assert (
        text_data("text-classification", rows={name: of(each) for name, each in rows.items()}, **WORDS).rows == expected
    )


@pytest.mark.parametrize("given", [5, "text", {"text": ["a"], "label": [0, 1]}, [1, 2]])
def test_what_is_no_table_of_rows_is_refused(given):
    with pytest.raises(hiso_jax.ParameterError, match="rows must"):
        text_data("text-classification", rows={"train": given, "test": given}, **WORDS)


def test_words_that_are_names_stand_for_their_labels():
    """In alphabetical order, each would stand for another label."""
    rows = [{"text": name, "label": name} for name in ("shipping", "billing", "Praise")]
    words = {"template": "{text} is", "verbalizer": (" billing", " shipping", " praise")}
    data = text_data("text-classification", rows={"train": rows, "test": rows}, **words)
    assert data.labels == ("billing", "shipping", "Praise")
    assert [row["label"] for row in data.rows["train"]] == [1, 0, 2]
    with pytest.raises(hiso_jax.ParameterError, match=r"labels must be given, .* 'billing' would .* 'shipping'"):
        text_data(
            "text-classification",
            rows={"train": rows, "test": rows},
            template="{text} is",
            verbalizer=(" thanks", " shipping", " money"),
        )
