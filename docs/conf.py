"""Sphinx configuration: `make docs`."""

import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Sphinx reads nothing outside this folder. Copies change with their sources only, to be run once.
(HERE / "notebooks").mkdir(exist_ok=True)
for source in sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb")):
    copy = HERE / "notebooks" / source.name
    if not copy.exists() or copy.read_bytes() != source.read_bytes():
        shutil.copyfile(source, copy)

project = "kradagrad-jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
html_theme = "furo"
html_title = "kradagrad-jax"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
