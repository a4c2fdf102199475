"""Configuration of the documentation: ``sphinx-build -W docs docs/_build`` builds it, offline."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# Pages run the command of this environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from hiso_jax.version import VERSION

project = "HiSo-JAX"
author = "the HiSo-JAX team"
copyright = "the HiSo-JAX team, Apache-2.0"
release = version = VERSION

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["_build", "_ext", ".jupyter_cache"]
html_theme = "sphinx_book_theme"
html_title = "HiSo-JAX"
html_theme_options = {"home_page_in_toc": True, "show_navbar_depth": 1, "show_toc_level": 2}
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages are executed where they are built; what they print is kept until they change.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / ".jupyter_cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
# Warnings of shells and kernels.
nb_output_stderr = "remove"
# Stored with their outputs: they need a model of 93 MB.
nb_execution_excludepatterns = ["tutorials/language_model.ipynb"]
if find_spec("torchax") is None or find_spec("torch") is None:
    # Shown without outputs where the extra torch is not installed.
    nb_execution_excludepatterns.append("guides/torch.md")

smartquotes = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
