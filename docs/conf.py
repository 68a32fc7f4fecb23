"""Sphinx configuration: `make docs`."""

project = "kradagrad-jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
html_theme = "furo"
html_title = "kradagrad-jax"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
