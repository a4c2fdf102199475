"""Commands and options that the documentation shows exist; its pictures are those of the measurements."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from hiso_jax.cli.main import COMMANDS, command_of
from hiso_jax.experiment import KINDS, NESTED, every_option, own_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
# Names that a reader replaces by paths.
PLACES = {"FOLDER_WITH_IDX_FILES": "folder", "FOLDER": "folder", "HOST:PORT": "localhost:1234", "N": "2", "I": "0"}


def commands(path):
    """The lines of a page that call the command, in blocks of the shell or as lines of a notebook."""
    blocks = re.findall(r"```(?:sh|\{code-cell\} python)\n(.*?)```", path.read_text(), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        found = re.match(r"!?(?:[^#]*&& \.venv/bin/)?(hiso-jax .*)", line.strip())
        if found:
            yield found[1]


CASES = [(path.relative_to(ROOT).as_posix(), line) for path in PAGES for line in commands(path)]


@pytest.mark.parametrize(("page", "line"), CASES)
def test_a_command_that_a_page_shows_is_one(page, line, monkeypatch, tmp_path):
    words = [PLACES.get(word, word) for word in shlex.split(line, comments=True)[1:]]
    if any(".py:" in word for word in words):
        # The user's own file does not exist here; its options are its own.
        assert words[0] in COMMANDS
        return
    monkeypatch.chdir(tmp_path)
    try:
        options, _ = command_of(words)
    except SystemExit as ended:
        pytest.fail(f"{line} ended with {ended.code}")
    assert type(options).__name__


def test_pages_have_commands():
    assert len(CASES) > 40


def test_options_that_the_migration_guide_names_exist():
    page = (ROOT / "docs" / "guides" / "migrate.md").read_text()
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"--([a-z-]+)", row)}
    known = {name.replace("_", "-") for name in every_option()}
    known |= {name.replace("_", "-") for kind, _ in COMMANDS.values() for name in own_options(kind)}
    known |= {name.replace("_", "-") for kind in (*KINDS.values(), *NESTED.values()) for name in kind.every_option()}
    assert named <= known, named - known


@pytest.mark.thorough
def test_pictures_are_drawn_from_the_measurements(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    rows = drawn["measured"]()
    for draw in ("bytes_at_a_glance", "bytes_and_passes"):
        figure = drawn[draw](rows)
        lines = [line for axis in figure.axes for line in axis.get_lines() if len(line.get_xdata()) > 2]
        assert len(lines) == len(drawn["SHOWN"]) * len(figure.axes)
    assert (ROOT / "docs" / "images" / "bytes.svg").exists()


def test_messages_that_the_reference_explains_exist():
    rows = (ROOT / "docs" / "reference" / "messages.md").read_text().splitlines()
    messages = [row.split("|")[1].strip(" `") for row in rows if row.startswith("| `")]
    # Lines of source without the quotes and line breaks between literals.
    code = "".join(path.read_text() for path in (ROOT / "hiso_jax").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    assert len(messages) > 8
    for fragment in (part.strip(" ;,") for message in messages for part in message.split("…")):
        assert fragment in code, fragment
