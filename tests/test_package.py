"""The package as a whole: the cost of importing it, and the examples in its documentation."""

import doctest
import importlib
import importlib.metadata
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hiso_jax
from hiso_jax import algorithms, renamed, zo
from hiso_jax.fed.ledger import storage
from hiso_jax.version import VERSION
from tests.marks import thorough

MODULES = [module.name for module in pkgutil.walk_packages(hiso_jax.__path__, "hiso_jax.")]


def test_import_is_light():
    heavy = ["transformers", "datasets", "matplotlib", "torch", "flax", "rich", "tyro", "orbax", "safetensors"]
    code = f"import sys, hiso_jax; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_the_command_line_imports_what_draws_and_downloads_only_when_needed():
    code = "import sys, hiso_jax.cli.main; print([n for n in ('matplotlib', 'datasets') if n in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_a_checkout_that_is_not_installed_writes_ledgers(monkeypatch):
    def of_what_is_installed(name):
        if name == "hiso-jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    installed = importlib.metadata.version
    assert installed("hiso-jax") == VERSION
    monkeypatch.setattr(importlib.metadata, "version", of_what_is_installed)
    monkeypatch.setattr(storage, "version", of_what_is_installed)
    assert storage.environment()["versions"]["hiso-jax"] == VERSION


def test_the_changelog_and_the_citation_are_of_this_version(repository):
    latest = re.findall(r"^## (\S+)$", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    cited = re.findall(r"^version: (\S+)$", (repository / "CITATION.cff").read_text(), re.MULTILINE)
    assert [latest] == cited == [VERSION]


def test_public_names_exist():
    for name in (
        "",
        ".zo",
        ".fed",
        ".tasks",
        ".models",
        ".algorithms",
        ".channels",
        ".reports",
        ".fed.run",
        ".fed.ledger",
    ):
        module = importlib.import_module(f"hiso_jax{name}")
        for public in module.__all__:
            assert hasattr(module, public), f"hiso_jax{name}.{public}"


# The examples of these modules tune, which takes tens of seconds.
TUNING = ("hiso_jax.tune.comparison", "hiso_jax.tune.sweeping")


@pytest.mark.parametrize("name", [thorough(name) if name in TUNING else name for name in MODULES])
def test_docstring_examples(name):
    # zo.scalars, zo.step and zo.accumulate are functions as attributes: the modules are in sys.modules.
    importlib.import_module(name)
    failed, _ = doctest.testmod(sys.modules[name])
    assert failed == 0


def python_blocks(repository):
    return re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


def test_readme_examples_run(repository, capsys, tmp_path, monkeypatch):
    blocks = python_blocks(repository)
    monkeypatch.chdir(tmp_path)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_to_files(repository, page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (repository / page).read_text()):
        if not link.startswith("http"):
            assert (repository / page).parent.joinpath(link).exists(), link


def test_the_method_that_the_documentation_shows_runs(repository, tmp_path):
    page = (repository / "docs" / "explanations" / "architecture.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(block)
    method = hiso_jax.algorithms.load(f"{tmp_path / 'mine.py'}:mine")
    assert next(iter(method.options)) == "sampler"
    assert method.rate("digits") == 0.003
    assert method.build(0.1, {"sampler": "sphere"}).has_scalars


@pytest.mark.parametrize("module", sorted(renamed.NAMES))
def test_names_of_earlier_releases_answer_with_their_successors(module):
    home = pydoc.locate(module)
    if isinstance(home, type):
        # An instance without its fields.
        home = tuple.__new__(home, ()) if issubclass(home, tuple) else object.__new__(home)
    for name, now in renamed.NAMES[module].items():
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; it has been replaced by {re.escape(now)}"):
            getattr(home, name)
        # The successor exists.
        path = re.match(r"[\w.]+", now)[0]
        owner, _, last = path.rpartition(".")
        # A field without a default is no attribute of its dataclass.
        is_field = last in getattr(pydoc.locate(owner), "__dataclass_fields__", ())
        assert pydoc.locate(path) is not None or is_field, path


def test_parameters_of_earlier_releases_answer_with_their_successors():
    for call in (zo.step, zo.scalars, hiso_jax.make_round, hiso_jax.SimulationConfig):
        with pytest.raises(hiso_jax.ParameterError, match="method is called `difference` now"):
            call(method="central")
    with pytest.raises(hiso_jax.ParameterError, match="method is called `difference` now"):
        hiso_jax.Experiment(method="central")
    with pytest.raises(hiso_jax.ParameterError, match="numbers is called `estimates` now"):
        zo.Difference(offsets=(0.0, 1.0), numbers=lambda losses, mu: losses)


@pytest.mark.thorough
def test_the_command_is_also_a_module():
    command = [sys.executable, "-m", "hiso_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"hiso-jax {hiso_jax.version.VERSION}\n"


def test_rooms_with_heavy_imports_are_attributes():
    assert hiso_jax.tasks.text.text_task.__name__ == "text_task"
    assert hiso_jax.models.lm.load.__name__ == "load"
    with pytest.raises(AttributeError, match="has no attribute 'vision_task'"):
        _ = hiso_jax.tasks.vision_task


def test_type_checkers_know_every_method():
    """Without its import, a type checker takes ``algorithms.hiso`` for the module."""
    text = (Path(algorithms.__file__)).read_text()
    for name in algorithms.NAMES:
        assert f"    from hiso_jax.algorithms.{name} import {name} as {name}\n" in text
