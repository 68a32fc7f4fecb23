"""The optimizers that every contract test runs over. A new one is one line here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj

MATMUL_ONLY = "matmul_only"  # claims that no factorisation primitive is in its program
LATE = "late"  # the first gradient makes no step, only the first basis
SCALE_FREE = "scale_free"  # claims that scaling all gradients leaves the updates as they are


@dataclasses.dataclass(frozen=True)
class Entry:
    """An alias with arguments.

    Attributes:
      name: id of the tests.
      alias: the complete optimizer.
      scale_by: the transformation that it is built on.
      learning_rate: one that solves the small problems of test_convergence.
      options: arguments of both.
      outer: arguments of the alias alone (momentum, decay).
      claims: what is promised beyond the contract.
    """

    name: str
    alias: Callable[..., optax.GradientTransformationExtraArgs]
    scale_by: Callable[..., optax.GradientTransformationExtraArgs]
    learning_rate: float
    options: dict[str, Any]
    outer: dict[str, Any]
    claims: frozenset[str]

    def make(self, learning_rate: Any = None, **changes: Any) -> optax.GradientTransformation:
        """The alias; by default with the entry's learning rate."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.alias(rate, **self.options | self.outer | changes)

    def twin(self, **changes: Any) -> optax.GradientTransformation:
        """The `scale_by_*` transformation with the same options."""
        return self.scale_by(**self.options | changes)


def _entry(
    name: str,
    base: str,
    learning_rate: float,
    claims: tuple[str, ...] = (),
    outer: dict[str, Any] | None = None,
    **options: Any,
) -> Entry:
    alias, scale_by = getattr(kj, base), getattr(kj, f"scale_by_{base}")
    return Entry(name, alias, scale_by, learning_rate, options, outer or {}, frozenset(claims))


ROOTS_NOW = {"refresh_every": 1}
BLOCKS = {"layout": kj.Layout(block_size=3, merge="none", pieces="tail", vectors="block")}
STAGGER = {"timing": kj.Timing(stagger=True), "refresh_every": 3}

# The defaults come first: tests that are too long for every configuration take these alone.
ALIASES = [
    _entry("shampoo", "shampoo", 3e-2),
    _entry("kradagrad_star", "kradagrad_star", 3e-2, (SCALE_FREE,)),
    _entry("kradagrad", "kradagrad", 3e-2, (SCALE_FREE,)),
]
ENTRIES = [
    *ALIASES,
    _entry("shampoo-paper", "shampoo", 0.5, preset="paper"),
    _entry("shampoo-square_root", "shampoo", 3e-2, statistics="square_root", refresh_every=2),
    _entry("shampoo-fold", "shampoo", 3e-2, statistics=kj.SquareRoot(fold_every=3)),
    _entry("shampoo-newton", "shampoo", 3e-2, (MATMUL_ONLY,), root="newton"),
    _entry("shampoo-tracked", "shampoo", 3e-2, root="tracked", refresh_every=2),
    _entry("shampoo-blocks", "shampoo", 3e-2, graft=kj.Graft("rmsprop", per="block"), **BLOCKS),
    _entry("shampoo-stagger", "shampoo", 3e-2, **STAGGER),
    _entry(
        "shampoo-momentum",
        "shampoo",
        1e-2,
        outer={"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        beta1="none",
        graft=kj.Graft("adagrad", normalize=True),
        timing=kj.Timing(start=3, ramp=2),
        **ROOTS_NOW,
    ),
    _entry("star-paper", "kradagrad_star", 0.5, preset="paper"),
    _entry("star-official", "kradagrad_star", 1e-2, preset="official"),
    _entry("star-factored", "kradagrad_star", 3e-2, form="factored"),
    _entry("star-exact", "kradagrad_star", 3e-2, form="exact", graft="sgd", fallback="adam"),
    _entry("star-delayed", "kradagrad_star", 3e-2, form="delayed", refresh_every=3),
    _entry("star-newton", "kradagrad_star", 3e-2, (MATMUL_ONLY,), root="newton"),
    _entry("star-tracked", "kradagrad_star", 3e-2, root="tracked", statistics_every=2),
    _entry("star-stagger", "kradagrad_star", 3e-2, **STAGGER),
    _entry("kradagrad-paper", "kradagrad", 0.3, preset="paper"),
    _entry("kradagrad-official", "kradagrad", 0.3, preset="official"),
    _entry("kradagrad-factored", "kradagrad", 3e-2, form="factored", **BLOCKS),
    _entry("sirfshampoo", "sirfshampoo", 3e-2, (MATMUL_ONLY,), batch_size=8),
    _entry("soap", "soap", 3e-2, (SCALE_FREE, LATE)),
    _entry("soap-official", "soap", 3e-2, preset="official"),
    _entry("soap-tracked", "soap", 3e-2, basis="tracked", **BLOCKS),
    _entry("soap-eigh", "soap", 3e-2, basis="eigh", normalize_grads=True, **STAGGER),
    _entry("soap-first", "soap", 3e-2, preset="basis_first", basis="qr", graft="adam"),
    _entry("kl_shampoo", "kl_shampoo", 3e-2, (SCALE_FREE, LATE)),
    _entry("kl_shampoo-official", "kl_shampoo", 3e-2, preset="official", **BLOCKS),
    _entry("kl_soap", "kl_soap", 3e-2, (SCALE_FREE, LATE), **STAGGER),
    _entry("tnt-empirical", "tnt", 0.5, fisher="empirical", damping=1.0),
    _entry("ginger-empirical", "ginger", 3e-2, fisher="empirical"),
    _entry("kradagrad-newton", "kradagrad", 3e-2, (MATMUL_ONLY,), root="newton", graft="none"),
]


# One of each algorithm: for tests that compile a program of their own.
CORE_NAMES = [
    "shampoo",
    "kradagrad_star",
    "kradagrad",
    "shampoo-square_root",
    "shampoo-fold",
    "shampoo-newton",
    "shampoo-tracked",
    "shampoo-stagger",
    "star-exact",
    "star-delayed",
    "kradagrad-factored",
    "soap",
    "soap-first",
    "kl_shampoo",
    "kl_soap",
]


def _over(entries: list[Entry]):
    """Parametrisation; tests of one entry share a worker where xdist keeps groups."""
    params = [pytest.param(e, id=e.name, marks=pytest.mark.xdist_group(e.name)) for e in entries]
    return pytest.mark.parametrize("entry", params)


over_aliases = _over(ALIASES)
over_entries = _over(ENTRIES)
over_core = _over([e for e in ENTRIES if e.name in CORE_NAMES])


def having(claim: str):
    """Parametrisation over the entries with a claim."""
    return _over([e for e in ENTRIES if claim in e.claims])


# The small tree that most tests use, so that compiled programs are shared between tests.
SHAPES = {"b": (3,), "w": (4, 3), "x": (4, 3)}


def params_like(shapes: Any = None, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Random arrays for a tree of shapes."""
    shapes = SHAPES if shapes is None else shapes
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s),
    )


@functools.cache
def compiled(name: str) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """(transformation, jitted init, jitted update) of an entry; one compilation per process."""
    tx = next(e for e in ENTRIES if e.name == name).make()
    return tx, jax.jit(tx.init), jax.jit(tx.update)


def run(update: Callable, state: Any, params: Any, steps: int, seed: int = 1) -> tuple[Any, Any]:
    """`steps` updates with the gradients of `grads_at`: final parameters and state."""
    for t in range(steps):
        updates, state = update(grads_at(params, t, seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def grads_at(params: Any, step: int, seed: int = 1) -> Any:
    """Gradients of step `step`: random, of the shapes and dtypes of the parameters."""
    rng = np.random.default_rng((seed, step))
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Same structure, shapes and dtypes, values within tolerances."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)), rtol, atol
        )


def assert_equal(ours: Any, theirs: Any) -> None:
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def all_finite(tree: Any) -> bool:
    """Whether every entry of every array is finite."""
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def types(tree: Any) -> Any:
    """Shape, dtype, weak type and sharding of every leaf, as text."""
    return jax.tree.map(lambda x: repr(jax.typeof(x)), tree)
