"""The optimizers that the optax contract runs over: a new one is a line."""

from typing import Any, NamedTuple

import jax

import kradagrad_jax as kj


class Entry(NamedTuple):
    """An alias with options, and what it claims."""

    name: str
    alias: Any
    options: dict[str, Any] = {}  # noqa: RUF012
    matmul_only: bool = False

    def make(self, learning_rate: Any = 1e-2, **options: Any):
        return self.alias(learning_rate, **(self.options | options))

    def __str__(self) -> str:
        return self.name


ENTRIES = [
    Entry("shampoo", kj.shampoo),
    Entry("shampoo_newton", kj.shampoo, {"root": "newton"}, matmul_only=True),
    Entry("shampoo_tracked", kj.shampoo, {"root": "tracked"}),
    Entry("shampoo_square_root", kj.shampoo, {"statistics": "square_root"}),
    Entry("shampoo_delayed_fold", kj.shampoo, {"statistics": kj.SquareRoot(fold_every=3)}),
    Entry("shampoo_paper", kj.shampoo, {"preset": "paper"}),
    Entry("shampoo_staggered", kj.shampoo, {"timing": kj.Timing(stagger=True)}),
    Entry("kradagrad_star", kj.kradagrad_star),
    Entry("kradagrad_star_newton", kj.kradagrad_star, {"root": "newton"}, matmul_only=True),
    Entry("kradagrad_star_factored", kj.kradagrad_star, {"form": "factored"}),
    Entry("kradagrad_star_exact", kj.kradagrad_star, {"form": "exact"}),
    Entry("kradagrad_star_delayed", kj.kradagrad_star, {"form": "delayed"}),
    Entry("kradagrad_star_official", kj.kradagrad_star, {"preset": "official"}),
    Entry("kradagrad", kj.kradagrad),
    Entry("kradagrad_paper", kj.kradagrad, {"preset": "paper"}),
]
DEFAULTS = [e for e in ENTRIES if not e.options]
FACTORIZATIONS = {
    "eigh", "svd", "qr", "geqrf", "householder_product", "cholesky", "lu", "triangular_solve",
    "schur", "eig", "tridiagonal",
}  # fmt: skip


def primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives of a jaxpr, those of its sub-programs included."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= primitives(inner)
    return found
