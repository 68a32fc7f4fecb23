"""Every alias on one small net, as one training step: what the sharding tests run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from kradagrad_jax import curvature
from kradagrad_jax.curvature import losses, sampled_gradients

WIDTH, DEPTH, CLASSES, BATCH = 8, 5, 8, 32
LOSS = losses.softmax_cross_entropy()
# blocks of 4 x 4: several buckets, of many blocks and of few
BLOCKS = kj.Layout(block_size=4)
SKETCH = {"sketch": kj.Sketch(rank=3, oversampling=2)}
SOON = {"refresh_every": 4}

GRADIENT = {
    "shampoo": {"layout": BLOCKS} | SOON,
    "kradagrad_star": {"layout": BLOCKS} | SOON,
    "kradagrad": {"layout": BLOCKS} | SOON,
    "sirfshampoo": {"batch_size": BATCH},
}
SAMPLED = {"tnt": {"damping": 0.1}, "ginger": {"damping": 0.1}}
LAYERS = {
    "kfac": SOON,
    "rs_kfac": SKETCH | SOON,
    "sre_kfac": SKETCH | SOON,
    "b_kfac": SKETCH | SOON,
    "br_kfac": SKETCH | SOON,
    "bc_kfac": SKETCH | SOON,
    "brc_kfac": SKETCH | SOON,
    "ikfac": {"damping": 1e-2},
    "ingd": {"damping": 1e-2},
    "singd": {"damping": 1e-2, "structures": ("hierarchical:2,2", "diagonal")},
}
ALIASES = [*GRADIENT, *SAMPLED, *LAYERS]


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """`DEPTH` equal layers and one more, of another shape, without a bias."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5, dtype)  # noqa: E731
    hidden = {f"dense{i}": {"w": draw(WIDTH, WIDTH), "b": draw(WIDTH)} for i in range(DEPTH)}
    return hidden | {"out": {"w": draw(WIDTH, 2 * CLASSES)}}


def model(p: dict[str, Any], x: jax.Array) -> jax.Array:
    for i in range(DEPTH):
        x = jnp.tanh(x @ p[f"dense{i}"]["w"] + p[f"dense{i}"]["b"])
    return x @ p["out"]["w"]


def batch(step: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng((1, step))
    x = rng.normal(size=(BATCH, WIDTH))
    return jnp.asarray(x, dtype), jnp.asarray(np.argmax(x, axis=1) + rng.integers(2), jnp.int32)


@functools.cache
def spec() -> curvature.CaptureSpec:
    return curvature.inspect(model, params(), batch(0)[0])


def make(name: str, rate: float = 1e-3, **changes: Any) -> optax.GradientTransformationExtraArgs:
    """The alias with the options of this file."""
    if name in LAYERS:
        return getattr(kj, name)(rate, spec(), **LAYERS[name] | changes)
    return getattr(kj, name)(rate, **(GRADIENT | SAMPLED)[name] | changes)


def measure(name: str) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``(params, x, y, key) -> gradients, extra arguments of the update``."""
    if name in LAYERS:
        take = curvature.model_value_grad_and_curvature(model, LOSS, reducer="raw")
    elif name in SAMPLED:
        take = sampled_gradients(model, LOSS)
    else:
        return lambda p, x, y, key: (jax.grad(lambda p: LOSS.value(model(p, x), y))(p), {})

    def with_statistics(p: Any, x: Any, y: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        _, grads, statistics = take(p, x, y, rng=key)
        return grads, {"curvature": statistics}

    return with_statistics


def step_of(name: str, tx: Any) -> Callable[..., tuple[Any, Any]]:
    """``(params, state, x, y, key) -> params, state``, to be jitted."""
    take = measure(name)

    def step(p: Any, state: Any, x: Any, y: Any, key: Any) -> tuple[Any, Any]:
        grads, extra = take(p, x, y, key)
        updates, state = tx.update(grads, state, p, **extra)
        return optax.apply_updates(p, updates), state

    return step


def train(name: str, tx: Any, p: Any, place: Callable[[Any], Any], steps: int, state: Any) -> Any:
    """Parameters and state after some steps; batches go through `place`."""
    dtype = jax.tree.leaves(p)[0].dtype
    step = jax.jit(step_of(name, tx))
    for t in range(steps):
        x, y = (place(v) for v in batch(t, dtype))
        p, state = step(p, state, x, y, jax.random.key(t))
    return p, state
