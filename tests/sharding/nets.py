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
    # with 1e-6 float32 eigenvectors of small eigenvalues carry rounding errors of 2e-5
    "shampoo": {"layout": BLOCKS, "damping": 1e-4} | SOON,
    "kradagrad_star": {"layout": BLOCKS} | SOON,
    "kradagrad": {"layout": BLOCKS} | SOON,
    "soap": {"layout": BLOCKS} | SOON,
    "kl_shampoo": {"layout": BLOCKS} | SOON,
    "kl_soap": {"layout": BLOCKS} | SOON,
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
TAKE_ROWS = {"b_kfac", "br_kfac", "bc_kfac", "brc_kfac", "ikfac", "ingd", "singd"}
ONE_OF_EACH = {"gradient": "shampoo", "sampled": "tnt", "layers": "kfac"}
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


def kind_of(name: str) -> str:
    """Where the statistics of an alias come from."""
    return "layers" if name in LAYERS else "sampled" if name in SAMPLED else "gradient"


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
