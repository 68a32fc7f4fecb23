"""Matrices, float64 references and program inspection for the tests of `linalg`."""

from collections.abc import Iterator

import numpy as np


def orthogonal(n: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def with_spectrum(w: np.ndarray, seed: int = 0) -> np.ndarray:
    """Symmetric matrix with eigenvalues `w`."""
    q = orthogonal(len(w), seed)
    a = (q * w) @ q.T
    return (a + a.T) / 2


def log_uniform(n: int, cond: float, seed: int = 0) -> np.ndarray:
    """Eigenvalues in [1 / cond, 1], both ends taken."""
    w = np.exp(-np.log(cond) * np.random.default_rng(seed).uniform(size=n))
    w[:2] = 1.0, 1.0 / cond
    return w


def power(a: np.ndarray, exponent: float) -> np.ndarray:
    w, v = np.linalg.eigh(np.asarray(a, np.float64))
    return (v * w**exponent) @ v.T


def relative_error(x, reference: np.ndarray) -> float:
    difference = np.asarray(x, np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def primitives(jaxpr) -> set[str]:
    """Names of all primitives of a (closed) jaxpr, inner programs included."""
    return {equation.primitive.name for equation in _equations(jaxpr)}


def _equations(jaxpr) -> Iterator:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(inner)


FACTORISATIONS = {"eigh", "svd", "qr", "geqrf", "householder_product", "cholesky", "lu"} | {
    "triangular_solve",
    "schur",
    "eig",
    "tridiagonal",
}
