"""The architecture stays as planned: small files and functions, and one file of the same form for each method."""

import ast
from pathlib import Path

import pytest

import hiso_jax
from hiso_jax import algorithms, channels

PACKAGE = Path(hiso_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_the_federation_and_its_reports_do_not_know_what_an_accuracy_is():
    for room in ("fed", "cli", "reports"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            assert "accuracy" not in path.read_text(), path


@pytest.mark.parametrize("name", algorithms.NAMES)
def test_a_method_is_one_short_file_that_cites_its_paper_on_line_one(name):
    text = (PACKAGE / "algorithms" / f"{name}.py").read_text()
    first = text.splitlines()[0]
    assert len(text.splitlines()) <= 80
    assert "arXiv" in first
    assert "Bytes a round:" in " ".join(text.split('"""')[1].split())
    assert algorithms.load(name).rate("digits") is not None
    assert algorithms.FACTORIES[name].__doc__


@pytest.mark.parametrize("name", channels.NAMES)
def test_a_channel_is_one_short_file(name):
    text = (PACKAGE / "channels" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert "arXiv" in text.splitlines()[0]
