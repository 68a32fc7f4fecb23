"""Statistics of one parameter, as they come out of a reducer: sums, or raw inputs and gradients.

A *part* is a dict of arrays, all with the leading axis ``stack``. Cotangents are those of the SUM
of the loss terms, so that parts of different micro-batches add up. The keys:

    A (stack, d_in, d_in) or Adiag (stack, d_in)      sum over positions of a a^T
    G (stack, d_out, d_out) or Gdiag (stack, d_out)   sum over positions of g g^T
    abar (stack, d_in), P (stack,)                    sum of a, number of positions
    D (stack, d)                                      elementwise: sum over examples of squares
    a (stack, N, R, d_in) or ids (stack, N, R)        raw inputs, or the rows read by a gather
    g (stack, C, N, R, d_out), scale ()               raw cotangents of C loss directions
    mask (stack, N, R)                                1 where the position counts; absent: all do
    v (stack, N, d)                                   raw elementwise gradients
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.layout import Layer
from kradagrad_jax.factors.method import Grams
from kradagrad_jax.linalg import matmul

Part = dict[str, jax.Array]
INPUT_SIDE = ("A", "Adiag", "abar", "P", "a", "ids", "mask")
_POWERS = {"G": 2, "Gdiag": 2, "D": 2, "L": 2, "R": 2, "v": 1, "scale": 1}


def wider(*dtypes: Any) -> Any:
    """The widest floating dtype, float32 at least (whatever jax's promotion rules are)."""
    floating = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([*floating, jnp.dtype(jnp.float32)], key=lambda d: jnp.finfo(d).bits)


def wide(x: jax.Array) -> jax.Array:
    """``x`` in float32 or better."""
    return x.astype(wider(x.dtype))


def scaled(part: Part, c: Any) -> Part:
    """The part for cotangents multiplied by ``c``."""
    factors = {k: jnp.asarray(c, x.dtype) ** _POWERS[k] for k, x in part.items() if k in _POWERS}
    return part | {key: part[key] * factor for key, factor in factors.items()}


def gram(x: jax.Array) -> jax.Array:
    """``x^T x`` of a stack ``(stack, n, d)``."""
    return matmul(jnp.swapaxes(x, -1, -2), x)


def raw_rows(part: Part, approx: str, bias: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unscaled rows ``a (stack, n, d)``, ``g (stack, C, n, d_out)`` and the count ``(stack,)``."""
    a, g = wide(part["a"]), wide(part["g"]) * wide(part["scale"])
    stack, n, r, _ = a.shape
    mask = part.get("mask")
    weight = jnp.ones((stack, n, r), a.dtype) if mask is None else wide(mask)
    count = part["P"]
    if approx == "reduce":
        seen = jnp.sum(weight, axis=2)
        a = jnp.sum(a, axis=2) / jnp.maximum(seen, 1)[..., None]
        g = jnp.sum(g, axis=3)
        weight = (seen > 0).astype(a.dtype)
        if mask is not None:
            count = jnp.sum(weight, axis=1)
        elif r > 1:
            count = count / r
    one = weight.reshape(stack, -1, 1)
    a = a.reshape(stack, -1, a.shape[-1])
    g = g.reshape(stack, g.shape[1], -1, g.shape[-1])
    return (jnp.concatenate([a, one], axis=-1) if bias else a), g, wide(count)


def tiled_rows(a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of C directions below each other, so that a and g have the same number of rows."""
    stack, c, n, d_out = g.shape
    if c > 1:
        a = jnp.tile(a, (1, c, 1)) / math.sqrt(c)
    return a, g.reshape(stack, c * n, d_out)


def with_bias(part: Part) -> jax.Array:
    """Sum of ``[a; 1] [a; 1]^T``, or its diagonal."""
    count = wide(part["P"])
    if "Adiag" in part:
        return jnp.concatenate([part["Adiag"], count[:, None]], axis=-1)
    column = part["abar"][:, :, None]
    top = jnp.concatenate([part["A"], column], axis=2)
    corner = count[:, None, None]
    bottom = jnp.concatenate([jnp.swapaxes(column, 1, 2), corner], axis=2)
    return jnp.concatenate([top, bottom], axis=1)


def row_counts(ids: jax.Array, weight: jax.Array | None, rows: int) -> jax.Array:
    """How often each row of an embedding was read: ``ids (..., N, R)`` -> ``(..., rows)``."""
    flat = ids.reshape(*ids.shape[:-2], -1).astype(jnp.int32)
    one = jnp.ones(flat.shape, float) if weight is None else weight.reshape(flat.shape)
    count = lambda i, w: jnp.zeros((rows,), w.dtype).at[i].add(w, mode="drop")  # noqa: E731
    for _ in range(flat.ndim - 1):
        count = jax.vmap(count)
    return count(flat, one)


def _trace(x: jax.Array) -> jax.Array:
    """Trace of a stack of matrices or of diagonals, ``(stack, 1, 1)``."""
    total = jnp.sum(x, -1) if x.ndim == 2 else jnp.trace(x, axis1=-2, axis2=-1)
    return total[:, None, None]


def tied_grams(layer: Layer, gathers: Grams, logits: Grams) -> Grams:
    """One Kronecker product for a matrix ``(V, d)`` used as embedding and as output weight.

    The vocabulary side is the identity; the other one is
    ``tr(A_gather) / V * G_gather + tr(G_logits) / V * A_logits``, which keeps the trace.
    """
    g = (_trace(gathers.a) * gathers.g + _trace(logits.g) * logits.a) / layer.d_in
    return Grams(jnp.ones((layer.stack, layer.d_in), g.dtype), g)
