"""A plain installation, without the extra ``datasets``, says how to get it."""

import importlib

import pytest

import hiso_jax
from hiso_jax import extras, tasks, tune
from hiso_jax.tasks.text.tasks import text_data


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    def import_module(name):
        if name.partition(".")[0] in ("datasets", "pyarrow", "pandas"):
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(extras, "import_module", import_module)


def test_hubs_and_parquet_and_pandas_name_the_extra(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"")
    (tmp_path / "validation.parquet").write_bytes(b"")
    results = tune.results.Rows()
    results.rows = list
    for use, sentence in (
        (tasks.mnist, "data_dir must name a folder with the four IDX files of mnist without datasets"),
        (
            lambda: text_data("sst2"),
            "data_dir must name a folder with train and validation files without datasets",
        ),
        (
            lambda: text_data("sst2", data_dir=tmp_path),
            "data_dir must hold .jsonl, .csv or .tsv files without pyarrow",
        ),
        (results.to_pandas, "to_pandas cannot be called without pandas"),
    ):
        with pytest.raises(hiso_jax.ParameterError, match=sentence) as found:
            use()
        package = str(found.value).partition(" without ")[2].partition(";")[0]
        assert str(found.value).endswith(f"; pip install {package} installs it")
