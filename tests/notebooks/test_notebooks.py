"""The notebooks: sources and .ipynb agree, they run, and they print what their text says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NEEDED = ("flax", "matplotlib", "sklearn")
QUIET = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def rows(text):
    """Lines that end in numbers: ``{what is before them: [numbers]}``."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(.*?\S)\s+((?:[\d.e+-]+\s*)+)$", line)
        if match:
            found[match[1]] = [float(x) for x in match[2].split()]
    return found


def quickstart(out):
    for kind in ("NNX", "linen"):
        ends = dict(re.findall(kind + r"\s+(\w+).*?(?:->|ends at) ([\d.]+)", out))
        assert float(ends["Shampoo"]) < float(ends["AdamW"])
    reached = dict(re.findall(r"linen\s+(\w+)\s+reached after (\d+)", out))
    assert 0.3 < int(reached["Shampoo"]) / int(reached["AdamW"]) < 0.7


def precision(out):
    gram, root, negative = re.search(r"to 1e-(\d+).*to 1e-(\d+).*former: (\d+)", out).groups()
    assert int(gram) <= 8 and int(root) >= 11 and int(negative) > 0
    loss = rows(out)
    for seed in (0, 1):
        exact, wrong, ridge, square, krad, krad64, descent = (
            loss[name][seed]
            for name in (
                "Shampoo, Gram, eps 1e-8, float64",
                "Shampoo, Gram, eps 1e-8, float32",
                "Shampoo, Gram, eps 1e-3, float32",
                "Shampoo, square root, eps 1e-8, float32",
                "KrADagrad*, float32",
                "KrADagrad*, float64",
                "gradient descent",
            )
        )
        assert wrong > 20 * exact and square < 1.2 * exact and ridge < wrong / 5
        assert abs(krad / krad64 - 1) < 0.01 and 5 * ridge < krad < descent


def half_precision(out):
    assert float(re.search(r"from the gradient: (\S+)", out)[1]) < 0.01
    table = re.findall(r"(\S.*?) +([\d.]+) +([\d.]+) +(\d+) +(True|False)\n", out)
    assert all(row[3:] == ("0", "True") for row in table)
    loss = {name: float(value) for name, value, *_ in table}
    size = {name: float(value) for name, _, value, *_ in table}
    adamw, dense, diagonal = "AdamW", "SINGD, dense, bf16 factors", "SINGD, diagonal, bf16 factors"
    assert loss["K-FAC"] < loss[dense] < loss[adamw]
    assert loss[diagonal] < 1.1 * loss[adamw]
    assert size[diagonal] < 0.6 * size[adamw] < size[adamw] < size["K-FAC"]
    assert "K-FAC: factor_dtype must be float32 or float64" in out


def composing(out):
    table = rows(out)
    assert float(re.search(r"from the formula: (\S+)", out)[1]) < 1e-4
    size = {name: int(n) for name, n in re.findall(r"'([\w-]+)': (\d+)", out)}
    assert size["one-sided"] < 0.5 * size["Shampoo"]
    names = ("one-sided", "one-sided, unit statistic, every 5th step", "inverse of inputs")
    ends = [table[name][0] for name in names]
    assert max(ends) < 0.95 * table["AdamW"][0] and max(ends) < 1.1 * min(ends)


def mesh(out):
    assert "8 devices" in out
    assert float(re.search(r"between the losses: (\S+)", out)[1]) < 1e-5
    factors = re.findall(r"\.factors.*\((\d+), 64, 64\) +\((\d+), 64, 64\)", out)
    assert factors == [("16", "2")] * 4
    assert "all-gather operations in the program of a step: 1\n" in out
    assert "all-to-all operations in the program of a step: 0\n" in out


CLAIMS = {
    "01_quickstart": quickstart,
    "02_float32_float64": precision,
    "03_kfac_singd_bf16": half_precision,
    "04_composing": composing,
    "05_mesh": mesh,
}


def test_notebooks_are_those_of_their_sources():
    """After a change: `python notebooks/generate.py`."""
    pytest.importorskip("jupytext", reason="jupytext makes the notebooks")
    from notebooks import generate

    assert generate.sources() == SOURCES
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [p.stem for p in SOURCES]
    for source in SOURCES:
        stored = source.with_suffix(".ipynb").read_text(encoding="utf-8")
        assert stored == generate.notebook(source), f"{source.stem}.ipynb is not up to date"
        assert str(ROOT) not in stored and '"outputs": []' in stored


def test_badges_and_installation():
    """Each links to itself; the cell that installs is the same, and does nothing outside Colab."""
    guards = set()
    for source in SOURCES:
        cells = source.read_text(encoding="utf-8").split("# %%")
        badge = rf"github/[\w./-]+/blob/main/notebooks/{source.stem}\.ipynb\)"
        assert re.search(badge, cells[1].splitlines()[1])
        assert "you should see" in cells[1] and "# ## What to try next" in cells[-1]
        guards.add(cells[2])
    (guard,) = guards
    assert 'if "google.colab" in sys.modules:' in guard and "--no-deps" in guard
    assert "kradagrad_jax-" in guard


def test_every_notebook_is_listed():
    assert list(CLAIMS) == [source.stem for source in SOURCES]
    for page in ("docs/notebooks.md", "notebooks/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not [name for name in CLAIMS if name not in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_source_runs_and_says_what_happens(name, tmp_path):
    for package in NEEDED:
        pytest.importorskip(package, reason="the notebooks use it")
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / f"{name}.py"],
        cwd=tmp_path, env=flags.default_environment() | QUIET | {"MPLBACKEND": "Agg"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    CLAIMS[name](done.stdout)


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    """One of them: the sources are run anyway, a kernel takes seconds to start."""
    for package in ("nbclient", "ipykernel", *NEEDED):
        pytest.importorskip(package, reason="kernels need it")
    import nbformat
    from nbclient import NotebookClient

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(FOLDER / "05_mesh.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    mesh("".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"))
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1
