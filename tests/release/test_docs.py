"""The pages for new users: their code runs, their error messages are those of the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature
from tests import flags

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENVIRONMENT = flags.default_environment() | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
ELSEWHERE = ("(Python)", "(optax)")  # whose message it is, where it is not ours


def printed(code, folder):
    """What a program prints, run in a folder of its own with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


PAGES = [f"docs/{name}" for name in ("install", "coming_from", "troubleshooting", "adding")]


@pytest.mark.parametrize("page", [pytest.param("README", marks=pytest.mark.slow), *PAGES])
def test_the_code_of_a_page_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"{page}.md").read_text(), re.DOTALL)
    start = next(i for i, block in enumerate(blocks) if "import" in block)
    code = "\n".join(block for block in blocks[start:] if not block.startswith("register("))
    printed(code, tmp_path)


EVERY_LINE = """
loops = {name: globals()[f"train_with_{name}"] for name in ("gradients", "layers", "samples")}
spec, first = curvature.inspect(model_fn, params, images[:100]), next(batches(1))
batches = lambda epochs: [first]
for line, loop in ROWS:
    capture = {"reducer": "raw"} if loop.endswith("rows") else {}
    run = lambda p: loops[loop.split(",")[0]](eval(line), p, **capture)
    assert jax.tree.map(jnp.shape, jax.eval_shape(run, params)) == jax.tree.map(jnp.shape, params)
"""


@pytest.mark.slow
def test_the_page_of_loops_has_every_alias_and_its_loop(tmp_path):
    """Its programs learn; each line of its table makes an optimizer that its loop can step."""
    text = (DOCS / "recipes.md").read_text()
    rows = re.findall(r"^\| [^|]* \| `(.*?)` \| (.*?) \|$", text, re.MULTILINE)
    aliases = {name.removeprefix("scale_by_") for name in dir(kj) if name.startswith("scale_by_")}
    aliases -= {"blocks", "layers"}
    assert {re.match(r"kj\.(\w+)", line)[1] for line, _ in rows} == aliases
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code = f"{code}\nROWS = {rows!r}\n{EVERY_LINE}"
    out = printed(code, tmp_path)
    ends = dict(re.findall(r"^(.*) (0\.\d+)$", out, re.MULTILINE))
    assert len(ends) == 6 and all(float(value) > 0.85 for value in ends.values()), ends


def test_pages_of_methods_have_all_parts():
    """Equations, presets, differences from the paper, what was reproduced and what was not."""
    pages = sorted((DOCS / "methods").glob("*.md"))
    assert len(pages) == 10
    for page in pages:
        text = page.read_text()
        parts = (
            r"\$\$",
            "preset",
            "differ",
            r"\n## Reproduced, and not",
            "not (attempted|reproduced):",
        )
        missing = [part for part in parts if not re.search(part, text, re.IGNORECASE)]
        assert not missing, (page.name, missing)
        assert f"methods/{page.stem}\n" in (DOCS / "index.md").read_text()


def messages():
    """Strings of errors and warnings; what an f-string fills in is one character."""
    for path in (ROOT / "kradagrad_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            warns = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            if not warns and not isinstance(node, ast.Raise):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.JoinedStr):
                    values = [v.value if isinstance(v, ast.Constant) else "\0" for v in part.values]
                    yield "".join(map(str, values))
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_messages_are_those_of_the_source():
    """First columns of the tables under a heading `message`; `..` stands for anything."""
    text = (DOCS / "troubleshooting.md").read_text()
    tables = re.findall(r"\| message \|.*?\n\|---\|---\|\n((?:\|.*\n)+)", text)
    rows = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    rows = [row for row in rows if not any(name in row for name in ELSEWHERE)]
    found = [
        (double or single).strip()
        for row in rows
        for double, single in re.findall(r"``(.*?)``|`([^`]*)`", row)
    ]
    assert len(found) > 25
    source = list(messages())
    for message in found:
        pattern = ".*".join(re.escape(part.strip()) for part in message.split(".."))
        matching = [s for s in source if re.search(pattern, s, re.DOTALL)]
        assert matching, message


def test_numbers_of_state_are_those_of_the_table():
    """Column "per weight" of docs/choosing.md: a 1024 x 1024 layer, a batch of 128."""
    text = (DOCS / "choosing.md").read_text().split("| per weight |")[1]
    table = re.match(r".*\n\|(?:---\|)+\n((?:\|.*\n)+)", text)
    assert table
    said = {}
    for row in table[1].splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for name in re.findall(r"\[`(\w+)`\]", cells[0]):
            said[name] = [float(x) for x in re.findall(r"[\d.]+", cells[4])]
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    batch = jax.ShapeDtypeStruct((128, 1024), jnp.float32)
    spec = curvature.inspect(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, batch)
    gradients_alone = (
        *("shampoo", "kradagrad_star", "kradagrad", "soap", "kl_shampoo", "kl_soap"),
        *("sirfshampoo", "tnt", "ginger"),
    )

    def numbers(name, **options):
        alias = getattr(kj, name)
        tx = alias(1e-3, *(() if name in gradients_alone else (spec,)), **options)
        state = jax.eval_shape(tx.init, params)
        return sum(x.size for x in jax.tree.leaves(state)) / 1024**2

    assert len(said) == 19
    for name, (default, *hierarchical) in said.items():
        assert numbers(name) == pytest.approx(default, abs=0.01), name
        if hierarchical:
            sparse = numbers(name, structures="hierarchical:15,15")
            assert sparse == pytest.approx(hierarchical[0], abs=0.01), name
