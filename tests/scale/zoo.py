"""All aliases on one small net, behind one interface: what the tests of this folder run over.

`Case.update` is compiled once per process, and donates the state that it is given: pass a copy
(`copied`) of a state that is looked at afterwards.
"""

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
from kradagrad_jax import curvature
from kradagrad_jax.engine import BlockState

BATCH, SIZES = 4, (6, 8, 3)  # wide enough that online low-rank factors are tracked, not decomposed
LOSS = curvature.losses.softmax_cross_entropy()
QUICK = {"xla_backend_optimization_level": 0}  # a third less to compile, for the same program
COUNTERS = ("count", "statistics", "skipped", "rejected")
Tree = Any


def model(p: Tree, x: jax.Array) -> jax.Array:
    """Two dense layers and a scale: the last one has no layer, it gets the fallback."""
    x = jnp.tanh(x @ p["dense0"]["kernel"] + p["dense0"]["bias"][None, :])
    return (x @ p["dense1"]["kernel"] + p["dense1"]["bias"][None, :]) * p["scale"][None, :]


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(100 + step), (BATCH, SIZES[0]))
    return x, jnp.argmax(x[:, : SIZES[-1]] + x[:, SIZES[-1] :], axis=1)


def params(dtype: Any = jnp.float32) -> Tree:
    rng = np.random.default_rng(0)

    def dense(m: int, n: int) -> Tree:
        kernel = jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(n, dtype)}

    layers = {f"dense{i}": dense(*SIZES[i : i + 2]) for i in range(2)}
    return layers | {"scale": jnp.ones(SIZES[-1], dtype)}


@jax.jit
def loss(p: Tree) -> jax.Array:
    """Of 64 examples that no step sees."""
    x = jax.random.normal(jax.random.key(7), (64, SIZES[0]))
    return LOSS.value(model(p, x), jnp.argmax(x[:, : SIZES[-1]] + x[:, SIZES[-1] :], axis=1))


@functools.cache
def spec() -> curvature.CaptureSpec:
    return curvature.inspect(model, params(), batch(0)[0])


@functools.cache
def _measure(kind: str) -> Callable[..., Any]:
    """Loss, gradient and curvature of a batch, compiled once for all aliases of a kind."""
    if kind == "layers":
        take = curvature.model_value_grad_and_curvature(model, LOSS, reducer="raw")
        return jax.jit(lambda p, x, y, key: take(p, x, y, rng=key))
    if kind == "samples":
        draw = curvature.sampled_gradients(model, LOSS)

        def sampled(p: Tree, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
            (loss, _), grads, samples = draw(p, x, y, rng=key)
            return loss, grads, samples

        return jax.jit(sampled)

    def plain(p: Tree, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        del key
        return *jax.value_and_grad(lambda p: LOSS.value(model(p, x), y))(p), None

    return jax.jit(plain)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An alias with arguments.

    Attributes:
      name: of the alias; after a hyphen, of what is special.
      kind: of its statistics: ``"gradients"``, ``"layers"`` or ``"samples"``.
      rate: learning rate that trains the net of this file.
      options: arguments; short intervals, so that few steps see everything that happens.
    """

    name: str
    kind: str
    rate: float
    options: dict[str, Any]

    def make(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """A new optimizer object."""
        args = (self.rate, spec()) if self.kind == "layers" else (self.rate,)
        alias = getattr(kj, self.name.split("-")[0])
        return alias(*args, **self.options | changes)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer whose compiled update all tests share; the state is donated."""
        made = self.make()
        return optax.GradientTransformationExtraArgs(
            made.init, jax.jit(made.update, donate_argnums=1, compiler_options=QUICK)
        )

    def measure(
        self, p: Tree, step: int, data: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, Tree, dict[str, Any]]:
        """Loss, gradients and the extra arguments of the update, at a step's batch or another."""
        x, y = batch(step) if data is None else data
        key = jax.random.key(step)
        loss, grads, found = _measure(self.kind)(p, x.astype(p["scale"].dtype), y, key)
        return loss, grads, {"curvature": found}  # None for gradient-only methods, which ignore it

    def step(self, p: Tree, state: Any, step: int, data: Any = None) -> tuple[Tree, Any, float]:
        """One step of training: parameters, state, and the loss before it."""
        loss, grads, extra = self.measure(p, step, data)
        updates, state = self.tx.update(grads, state, p, **extra)
        return optax.apply_updates(p, updates), state, float(loss)

    def train(self, p: Tree, state: Any, steps: range) -> tuple[Tree, Any]:
        """Steps of training; the state is donated."""
        for t in steps:
            p, state, _ = self.step(p, state, t)
        return p, state


_SKETCH = {"sketch": kj.Sketch(rank=2, oversampling=2), "refresh_every": 2}
_ROOTS = {"refresh_every": 2}
_BF16 = {"factor_dtype": jnp.bfloat16}
CASES = [
    Case("shampoo", "gradients", 3e-2, _ROOTS),
    Case("kradagrad_star", "gradients", 3e-2, _ROOTS),
    Case("kradagrad", "gradients", 3e-2, _ROOTS),
    Case("sirfshampoo", "gradients", 3e-2, {"batch_size": BATCH}),
    Case("soap", "gradients", 3e-2, _ROOTS),
    Case("kl_shampoo", "gradients", 3e-2, _ROOTS),
    Case("kl_soap", "gradients", 3e-2, _ROOTS),
    Case("tnt", "samples", 1e-2, _ROOTS | {"damping": 0.3}),
    Case("ginger", "samples", 1e-2, {}),
    Case("kfac", "layers", 3e-2, _ROOTS),
    Case("rs_kfac", "layers", 0.1, _SKETCH),
    Case("sre_kfac", "layers", 0.1, _SKETCH),
    Case("b_kfac", "layers", 0.1, _SKETCH),
    Case("br_kfac", "layers", 0.1, _SKETCH),
    Case("bc_kfac", "layers", 0.1, _SKETCH),
    Case("brc_kfac", "layers", 0.1, _SKETCH),
    Case("ikfac", "layers", 3e-2, {}),
    Case("ingd", "layers", 3e-2, {}),
    Case("singd", "layers", 3e-2, {"structures": "hierarchical:2,2"}),
]

# states of other types: half precision, gradients that are waiting
STORED = [
    Case("shampoo-fold", "gradients", 3e-2, _ROOTS | {"statistics": kj.SquareRoot(fold_every=3)}),
    Case("kradagrad_star-delayed", "gradients", 3e-2, _ROOTS | {"form": "delayed"}),
    Case("ginger-bf16", "samples", 1e-2, {"basis_dtype": jnp.bfloat16}),
    Case("sirfshampoo-bf16", "gradients", 3e-2, {"batch_size": BATCH, **_BF16}),
    Case("singd-bf16", "layers", 3e-2, {"structures": "hierarchical:2,2", **_BF16}),
]


FAMILIES = ("shampoo", "kradagrad", "sirfshampoo", "tnt", "ginger", "kfac", "brc_kfac", "singd")


def _over(cases: list[Case], fast: tuple[str, ...] | None = None):
    """Parametrisation; the tests of one case run in one process, which compiles its update once."""
    marked = []
    for c in cases:
        slow = [pytest.mark.slow] if fast is not None and c.name not in fast else []
        marked.append(pytest.param(c, id=c.name, marks=[pytest.mark.xdist_group(c.name), *slow]))
    return pytest.mark.parametrize("case", marked)


over_all = _over(CASES)
over_families = _over(CASES, FAMILIES)  # the others are slow tests
over_stored = _over(CASES + STORED)


def copied(tree: Tree) -> Tree:
    """The tree with buffers of its own."""
    return jax.tree.map(jnp.copy, tree)


def engine_state(state: Any) -> BlockState:
    """The state of the engine inside of a chain's."""
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, BlockState))
    return next(x for x in parts if isinstance(x, BlockState))


def counters(state: Any) -> dict[str, int]:
    """The engine's counters; of statistics, those of the block that has the fewest."""
    found = kj.diagnostics(engine_state(state))
    return {name: int(found[name]) for name in COUNTERS}


def blocks(state: Any) -> int:
    """Number of blocks that have factors."""
    return sum(len(jax.tree.leaves(x)[0]) for x in engine_state(state).factors.values())
