"""Local files of text: read as they are written, each from its own path."""

import json
import os

import pytest

from hiso_jax.tasks.text.data import load_rows
from hiso_jax.tasks.text.files import read_rows

TEXTS = ["2020-01-01", "2", "NA", "null", "1e5", "007", "", "true", 'a "quoted", word', "two\nlines", "NaN", " x "]


def as_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "label": place % 2}) + "\n" for place, text in enumerate(texts)))


def as_csv(path, texts):
    cells = ('"' + text.replace('"', '""') + '"' for text in texts)
    path.write_text("text,label\n" + "".join(f"{cell},{place % 2}\n" for place, cell in enumerate(cells)), newline="")


def as_parquet(path, texts):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts, "label": [place % 2 for place in range(len(texts))]}), path)


@pytest.mark.parametrize(("ending", "write"), [("jsonl", as_jsonl), ("csv", as_csv), ("parquet", as_parquet)])
def test_text_stays_text(tmp_path, ending, write):
    write(tmp_path / f"rows.{ending}", TEXTS)
    rows = read_rows(tmp_path / f"rows.{ending}")
    assert rows == [{"text": text, "label": place % 2} for place, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["data[1]", "q?", "*", "label=3"])
@pytest.mark.parametrize(("ending", "write"), [("jsonl", as_jsonl), ("parquet", as_parquet)])
def test_a_folder_is_the_one_of_its_name(tmp_path, name, ending, write):
    for folder, text in (("data1", "other"), ("q1", "other"), (name, "mine")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for split in ("train", "validation"):
            write(tmp_path / folder / f"{split}.{ending}", [text, text])
    rows = load_rows(None, tmp_path / name, ["text", "label"])
    assert [row["text"] for row in rows["train"]] == ["mine", "mine"]
    assert set(rows["train"][0]) == {"text", "label"}


def test_a_file_changed_within_its_time_stamp_is_read_again(tmp_path):
    path = tmp_path / "train.jsonl"
    as_jsonl(path, ["old"])
    stamp = os.stat(path).st_mtime_ns
    assert read_rows(path)[0]["text"] == "old"
    as_jsonl(path, ["new"])
    os.utime(path, ns=(stamp, stamp))
    assert read_rows(path)[0]["text"] == "new"


def test_only_line_breaks_end_a_row_of_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\r\none\u2028two\x0bthree,1\r\n", newline="")
    assert read_rows(path) == [{"text": "one\u2028two\x0bthree", "label": 1}]


def test_numbers_are_read_from_csv_labels_only(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label,text\nneg,1\n1,2\n")
    assert [row["label"] for row in read_rows(path)] == ["neg", "1"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n\n[1]\n', "line 3 must be an object with the columns as names, got a list"),
        ("rows.json", b'[{"text": "a"}, 3]', "entry 2 must be an object"),
        ("rows.jsonl", b'{"text": "\xff"}', "it is not UTF-8 text"),
        ("rows.jsonl", b'{"a":' + b"[" * 100_000, "nested too deeply"),
        ("rows.csv", b"text,label\na,1,2\n", "line 2 must have 2 cells, as the first line has, and has more"),
        ("rows.csv", b"text,label\na,1\nb\n", "line 3 must have 2 cells, as the first line has, and has 1"),
        ("rows.csv", b"text,text\na,1\n", "its first line must name each column once, got text, text"),
        ("rows.csv", b'text,label\n"a,1\n', "unexpected end of data"),
        ("rows.parquet", b"PAR1 nothing", "rows.parquet cannot be read"),
    ],
)
def test_damage_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as refused:
        read_rows(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name} cannot be read: ")
    assert "\n" not in str(refused.value)
