"""Check the types of README's Python and of the examples, as a user's mypy or pyright would.

python -m tests.readme_types [mypy | pyright]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Write each block of README's Python into a file of its own, and check them; the checker's exit code."""
    checker, root = (sys.argv[1:] or ["mypy"])[0], Path(__file__).parents[1]
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", (root / "README.md").read_text(), re.S)
    assert len(blocks) >= 3, "README has lost its Python"
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks):
            (Path(folder) / f"block_{number}.py").write_text(block)
        (Path(folder) / "pyrightconfig.json").write_text(
            json.dumps({"extraPaths": [str(root), str(root / "examples")]})
        )
        options = {
            "mypy": ["--no-incremental", "--config-file", "", "--ignore-missing-imports", "--follow-imports", "silent"],
            "pyright": [],
        }[checker]
        command = [sys.executable, "-m", checker, *options, folder, str(root / "examples")]
        return subprocess.run(command, env={**os.environ, "MYPYPATH": str(root)}, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
