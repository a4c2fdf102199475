"""Execute the pages that are stored with their outputs, because they need a model of 93 MB.

SMOLLM2=SmolLM2-135M-Instruct.Q4_1.gguf python docs/execute.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

STORED = ("tutorials/language_model.ipynb",)


def execute(path: Path) -> None:
    """Execute a notebook in its folder, and store its outputs without what it wrote to standard error."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    nbformat.write(book, path)


if __name__ == "__main__":
    for name in STORED:
        execute(Path(__file__).parent / name)
