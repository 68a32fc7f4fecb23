"""Factorisations of jax are called in `linalg/lapack.py` only (see its docstring)."""

import ast
from pathlib import Path

import pytest

import kradagrad_jax.linalg.lapack

LAPACK = Path(kradagrad_jax.linalg.lapack.__file__)
PACKAGE = LAPACK.parents[1]
DOORS = ("jnp.linalg", "jax.numpy.linalg", "jax.scipy.linalg", "jsp.linalg", "jax.lax.linalg")
DOORS = (*DOORS, "lax.linalg", "jax.scipy", "jax.numpy", "jax.lax")


def factorisations(source: str) -> list[str]:
    """Names of `jax...linalg` functions that a program uses or imports, but for norms."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in DOORS and owner.endswith("linalg") and "norm" not in node.attr:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in DOORS:
            whole = node.module.endswith("linalg")
            found += [a.name for a in node.names if (whole or a.name == "linalg")]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name in DOORS and "linalg" in a.name]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "jnp.linalg.eigh(a)",
        "jax.vmap(jax.numpy.linalg.svd)(a)",
        "jax.lax.linalg.qr(a)",
        "lax.linalg.triangular_solve(a, b)",
        "from jax.lax import linalg",
        "from jax.scipy.linalg import cho_solve",
        "import jax.numpy.linalg as la",
    ],
)
def test_the_search_finds(source):
    assert factorisations(source)


def test_the_search_spares_norms_and_numpy():
    assert not factorisations("jnp.linalg.norm(a); np.linalg.eigh(a); linalg.eigh(a)")


def test_factorisations_are_called_in_one_file_only():
    assert factorisations(LAPACK.read_text())
    for path in PACKAGE.rglob("*.py"):
        if path != LAPACK:
            assert not factorisations(path.read_text()), path
