"""The methods that need `curvature=`, on one small net: what their contract tests run over."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature

BATCH = 8
SIZES = (6, 16, 14, 3)
LOSS = curvature.losses.softmax_cross_entropy()
MATMUL_ONLY = "matmul_only"


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An alias with arguments; `rate` trains the net of this file."""

    name: str
    alias: Any
    rate: float
    options: dict[str, Any]
    claims: frozenset[str] = frozenset()

    def make(self, rate: Any = None, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.alias(self.rate if rate is None else rate, spec(), **self.options | changes)


def _entry(name: str, base: str, rate: float, *claims: str, **options: Any) -> Entry:
    return Entry(name, getattr(kj, base), rate, options, frozenset(claims))


_SKETCH = {"sketch": kj.Sketch(rank=4, oversampling=2), "refresh_every": 2}
ENTRIES = [
    _entry("kfac", "kfac", 3e-2),
    _entry("kfac-official", "kfac", 1e-2, preset="official", norm_constraint=1e-2),
    _entry("kfac-exact", "kfac", 3e-2, damping_rule="exact", refresh_every=2),
    _entry("kfac-square_root", "kfac", 3e-2, statistics="square_root"),
    _entry("rs_kfac", "rs_kfac", 0.1, **_SKETCH),
    _entry("sre_kfac", "sre_kfac", 0.1, **_SKETCH),
    _entry("b_kfac", "b_kfac", 0.1, **_SKETCH),
    _entry("br_kfac", "br_kfac", 0.1, **_SKETCH),
    _entry("bc_kfac", "bc_kfac", 0.1, **_SKETCH),
    _entry("brc_kfac", "brc_kfac", 0.1, **_SKETCH),
    _entry("ikfac", "ikfac", 3e-2, MATMUL_ONLY),
    _entry("ingd", "ingd", 3e-2, MATMUL_ONLY),
    _entry("singd", "singd", 3e-2, MATMUL_ONLY, structures="hierarchical:2,2", refresh_every=2),
    _entry("singd-bf16", "singd", 3e-2, MATMUL_ONLY, factor_dtype=jnp.bfloat16),
]


# For tests of wrappers, whose programs are long: one entry per family.
FAMILIES = ("kfac", "br_kfac", "singd")


def each(*claims: str, names: tuple[str, ...] = ()):
    """Parametrizes a test over the entries that make all these claims (and have these names).

    The tests of one entry run in one process, which compiles its update once.
    """
    entries = [e for e in ENTRIES if set(claims) <= e.claims and (not names or e.name in names)]
    marked = [pytest.param(e, marks=pytest.mark.xdist_group(e.name)) for e in entries]
    return pytest.mark.parametrize("entry", marked, ids=[e.name for e in entries])


@functools.cache
def compiled(entry: Entry) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """The optimizer of an entry and its jitted update."""
    tx = entry.make()
    return tx, jax.jit(tx.update)


def params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    key = jax.random.key(seed)
    out = {}
    for i, (m, n) in enumerate(itertools.pairwise(SIZES)):
        w = jax.random.normal(jax.random.fold_in(key, i), (m, n)) / jnp.sqrt(m * 1.0)
        out[f"dense{i}"] = {"kernel": w.astype(dtype), "bias": jnp.zeros(n, dtype)}
    return out | {"scale": jnp.ones(SIZES[-1], dtype)}


def model(p: dict[str, Any], x: jax.Array) -> jax.Array:
    for i in range(len(SIZES) - 1):
        x = x @ p[f"dense{i}"]["kernel"] + p[f"dense{i}"]["bias"][None, :]
        x = jnp.tanh(x) if i < len(SIZES) - 2 else x
    return x * p["scale"][None, :]


def batch(step: int = 0) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(100 + step), (BATCH, SIZES[0]))
    return x, jnp.argmax(x[:, : SIZES[-1]] + x[:, SIZES[-1] :], axis=1)


@functools.cache
def spec() -> curvature.CaptureSpec:
    return curvature.inspect(model, params(), batch()[0])


take = curvature.model_value_grad_and_curvature(model, LOSS, reducer="raw")


_take = jax.jit(take)


def measured(p: Any, step: int = 0) -> tuple[jax.Array, Any, Any]:
    """Loss, gradient and statistics of one batch."""
    x, y = batch(step)
    x = x.astype(p["scale"].dtype)
    return _take(p, x, y, rng=jax.random.key(step))
