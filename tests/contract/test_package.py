"""The package as a whole: imports go down, nothing private, nothing printed, nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kradagrad_jax as kj

ROOT = Path(kj.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LIBRARY = [f for f in FILES if "experiments" not in f.parts]
FLAX_HELPERS = ("flax_nnx", "train_state")  # import flax when they are called
FLOORS = ["linalg", "factors", "engine", "transforms", "alias", "experiments"]
EXPERIMENTS_ONLY = {"flax", "orbax", "matplotlib", "sklearn", "tyro", "tqdm", "numpyro"}


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Dotted names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """`a.b.c` of an attribute expression, or ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_private_modules(path):
    tree = ast.parse(path.read_text())
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for module in {*imports(path), *used}:
        root, *parts = module.split(".")
        if root in ("jax", "jnp", "optax", "flax", "chex", "lax"):
            assert not any(p.startswith("_") and not p.startswith("__") for p in parts), module


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_nothing_is_printed_or_logged(path):
    """But for `curvature`: its check prints a table, and a guess is a warning.

    The engine warns of one thing, once: of stacked layers that the layout does not know.
    """
    if path.parent.name == "curvature":
        return
    warned = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in ("print", "jax.debug.print")
            warned += dotted(node.func) == "warnings.warn"
    assert warned == (name(path) == "engine/transform.py")
    assert "logging" not in set(imports(path))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_go_down_only(path):
    modules = set(imports(path))
    if path.stem not in FLAX_HELPERS:
        assert not {m.split(".")[0] for m in modules} & EXPERIMENTS_ONLY
    floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if floor not in FLOORS:
        return
    above = FLOORS[FLOORS.index(floor) + 1 :]
    inner = [m.split(".")[1] for m in modules if m.startswith("kradagrad_jax.")]
    # factors/method.py is the interface that the engine and every method share
    assert not set(inner) & set(above), modules
    if floor == "linalg":
        assert not any(m.split(".")[0] in ("optax", "chex") for m in modules)


def test_importing_it_is_light():
    """No flax, no plotting; the backend is not started."""
    code = (
        "import sys, kradagrad_jax; "
        f"assert not set(sys.modules) & {EXPERIMENTS_ONLY!r}, set(sys.modules); "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_public_face_is_documented():
    for public in [n for n in dir(kj) if not n.startswith("_")]:
        thing = getattr(kj, public)
        if callable(thing):
            assert thing.__doc__, public
            assert len(thing.__doc__) > 40, public
    assert kj.__version__
