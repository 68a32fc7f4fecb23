"""Writes the notebooks (.ipynb) from their sources (.py, percent format): `python generate.py`.

The same source gives the same bytes: no outputs, no paths, cells numbered in order.
"""

from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """The percent scripts, in order."""
    return sorted(HERE.glob("[0-9]*.py"))


def notebook(source: Path) -> str:
    """Text of the notebook of a percent script."""
    made = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    made.metadata = nbformat.from_dict(METADATA)
    made.nbformat, made.nbformat_minor = 4, 5
    for number, cell in enumerate(made.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{number:02}"
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for path in sources():
        path.with_suffix(".ipynb").write_text(notebook(path), encoding="utf-8")
