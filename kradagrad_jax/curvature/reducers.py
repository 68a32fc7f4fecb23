"""What is kept of the inputs and output gradients of one use, computed in the backward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kradagrad_jax.curvature.conv import Patches
from kradagrad_jax.curvature.layout import Layer
from kradagrad_jax.curvature.parts import Part, row_counts, wide, wider
from kradagrad_jax.curvature.plan import Tap
from kradagrad_jax.curvature.uses import RowIds, canonical_scale

NAMES = ("kron", "kron_reduce", "diag", "raw", "tnt")
CustomReduce = Callable[[Layer, jax.Array, jax.Array, Any], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Reducer:
    """What the capture returns for every use of a layer.

    Attributes:
      name: ``"kron"``: the sums of a a^T and of g g^T over all positions; ``"kron_reduce"``: of
        the mean of a and the sum of g over the positions of an example (arXiv 2311.00636);
        ``"diag"``: the diagonals of the former; ``"raw"``: a and g themselves; ``"tnt"``: second
        moments of the per-example gradients, ``L`` and ``R``.
      max_dim: sides above it are kept as diagonals.
      mask_zero_g: positions whose output gradient is exactly zero do not count (padding).
      custom: ``custom(layer, a, g, extra) -> dict`` of arrays with leading axis S, in place of
        the above: ``a: (S, N, R, d_in)`` (row numbers ``(S, N, R)`` for an embedding) and
        ``g: (S, N, R, d_out)`` of the sum of the loss terms, in float32 or better. The arrays are
        summed over uses and found in ``Curvature.stats[path]``.
    """

    name: str = "kron"
    max_dim: int = 8192
    mask_zero_g: bool = False
    custom: CustomReduce | None = None

    def __post_init__(self) -> None:
        if self.custom is None and self.name not in (*NAMES, "identity"):
            raise ValueError(f"reducer must be one of {', '.join(NAMES)}, got {self.name!r}")

    @property
    def keeps_positions(self) -> bool:
        """Whether iterations of a loop are kept apart instead of summed."""
        return self.name == "raw"


def as_reducer(reducer: "str | Reducer | CustomReduce") -> Reducer:
    """A reducer from its name, or from a function."""
    if isinstance(reducer, Reducer):
        return reducer
    if isinstance(reducer, str):
        return Reducer(reducer)
    return Reducer("custom", custom=reducer)


def reduce_use(
    reducer: Reducer,
    tap: Tap,
    operands: Sequence[Any],
    g: jax.Array,
    scale: Any,
    extra: Any,
) -> Part:
    """Statistics of one use from the operands of its tap and the cotangent of its output."""
    activation, multiplier = operands
    if tap.layer is None:
        return _elementwise(reducer, tap, activation, multiplier, g)
    averaged = reducer.name == "kron_reduce" and not reducer.mask_zero_g
    a, g = canonical(tap, activation, g, averaged)
    if reducer.custom is not None:
        factor = jnp.asarray(scale * tap.use.view.factor, wide(g).dtype)
        return reducer.custom(tap.layer, a if _ids(tap) else wide(a), wide(g) * factor, extra)
    mask = jnp.any(g != 0, axis=-1) if reducer.mask_zero_g else None
    if reducer.name == "identity":
        return {"W": _identity(tap, a, g)}
    if reducer.name == "raw":
        return _raw(tap, a, g, mask)
    if reducer.name == "tnt":
        return _tnt(tap, a, g)
    return _sums(reducer, tap, a, g, mask)


def canonical(
    tap: Tap, activation: Any, g: jax.Array, averaged: bool = False
) -> tuple[jax.Array, jax.Array]:
    """a (or row ids) and g in canonical form, cut to the part of a concatenated weight.

    ``averaged``: patches of a convolution may come as their mean, R = 1.
    """
    use = tap.use
    assert use.inputs is not None
    if averaged and isinstance(use.inputs, Patches):
        a = use.inputs.means(activation)
    else:
        a = use.inputs(activation)
    g = use.outputs(g)
    begin, end = use.part
    if use.side == "rows":
        a = a[..., begin:end]
    elif use.side == "columns":
        g = g[..., begin:end]
    return a, g


def _ids(tap: Tap) -> bool:
    return isinstance(tap.use.inputs, RowIds)


def contract(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x^T y`` of ``(S, ..., d)`` and ``(S, ..., e)``, accumulated in float32 or better."""
    dtype = wider(x.dtype, y.dtype)
    if x.dtype != y.dtype:
        x, y = x.astype(dtype), y.astype(dtype)
    precision = lax.Precision.HIGHEST
    dims = tuple(range(1, x.ndim - 1))
    if x.shape[0] == 1:  # without batch dimension: the plain matrix product of the backend
        inner = tuple(d - 1 for d in dims)
        numbers = ((inner, inner), ((), ()))
        out = lax.dot_general(
            x[0], y[0], numbers, precision=precision, preferred_element_type=dtype
        )
        return out[None]
    numbers = ((dims, dims), ((0,), (0,)))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=dtype)


def _squares(x: jax.Array, max_dim: int) -> tuple[str, jax.Array]:
    """Second moment, or its diagonal above ``max_dim``."""
    if x.shape[-1] > max_dim:
        return "diag", jnp.sum(jnp.square(wide(x)), axis=(1, 2))
    return "", contract(x, x)


def _sums(reducer: Reducer, tap: Tap, a: jax.Array, g: jax.Array, mask: Any) -> Part:
    s, n, r = g.shape[:3]
    limit = 0 if reducer.name == "diag" else reducer.max_dim
    count = jnp.full((s,), n * r, float)
    if mask is not None:
        count = jnp.sum(mask, axis=(1, 2), dtype=float)
    out: Part = {}
    if _ids(tap):
        assert tap.layer is not None
        out["Adiag"] = row_counts(a, None if mask is None else wide(mask), tap.layer.d_in)
    else:
        if mask is not None:
            a = a * mask[..., None].astype(a.dtype)
        if reducer.name == "kron_reduce":
            a, g, count = _reduced(a, g, mask, count)
        key, out_a = _squares(a, limit)
        out["A" + key], out["abar"] = out_a, jnp.sum(wide(a), axis=(1, 2))
    key, out_g = _squares(g, limit)
    return {**out, "G" + key: out_g, "P": count}


def _reduced(a: jax.Array, g: jax.Array, mask: Any, count: jax.Array) -> tuple[Any, Any, Any]:
    """Mean of a and sum of g over the positions of each example."""
    if g.shape[2] == 1:
        return a, g, count
    if mask is None:
        a = a if a.shape[2] == 1 else jnp.mean(wide(a), axis=2, keepdims=True)
        return a, jnp.sum(wide(g), axis=2, keepdims=True), count / g.shape[2]
    seen = jnp.sum(mask, axis=2, dtype=float)
    a = jnp.sum(wide(a), axis=2, keepdims=True) / jnp.maximum(seen, 1)[..., None, None]
    count = jnp.sum(seen > 0, axis=1, dtype=float)
    return a, jnp.sum(wide(g), axis=2, keepdims=True), count


def _raw(tap: Tap, a: jax.Array, g: jax.Array, mask: Any) -> Part:
    s, n, r = g.shape[:3]
    out: Part = {"P": jnp.full((s,), n * r, float)}
    if mask is not None:
        out = {"P": jnp.sum(mask, axis=(1, 2), dtype=float), "mask": wide(mask)}
        a = a if _ids(tap) else a * mask[..., None].astype(a.dtype)
    if _ids(tap):
        return {**out, "ids": a.astype(jnp.float32), "g": g[:, None]}
    return {**out, "a": a, "g": g[:, None]}


def _tnt(tap: Tap, a: jax.Array, g: jax.Array) -> Part:
    """Sums over examples of ``W W^T`` and ``W^T W``, W = sum over positions of ``a g^T``."""
    if _ids(tap):
        return _sums(Reducer("kron"), tap, a, g, None)
    a, g = wide(a), wide(g)
    high = lax.Precision.HIGHEST
    if g.shape[2] > min(a.shape[-1], g.shape[-1]):
        w = jnp.einsum("snri,snrj->snij", a, g, precision=high)
        left = jnp.einsum("snij,snkj->sik", w, w, precision=high)
        right = jnp.einsum("snij,snik->sjk", w, w, precision=high)
        return {"L": left, "R": right}
    aa = jnp.einsum("snri,snqi->snrq", a, a, precision=high)
    gg = jnp.einsum("snri,snqi->snrq", g, g, precision=high)
    left = jnp.einsum("snri,snrq,snqk->sik", a, gg, a, precision=high)
    right = jnp.einsum("snri,snrq,snqk->sik", g, aa, g, precision=high)
    return {"L": left, "R": right}


def _identity(tap: Tap, a: jax.Array, g: jax.Array) -> jax.Array:
    """``sum a g^T``, which must be the gradient of the leaf."""
    factor = tap.use.view.factor
    if not _ids(tap):
        return factor * contract(a, g)
    assert tap.layer is not None
    zero = jnp.zeros((tap.layer.d_in, g.shape[-1]), wide(g).dtype)
    ids = a.reshape(-1)
    return factor * zero.at[ids].add(wide(g).reshape(-1, g.shape[-1]), mode="drop")[None]


def _elementwise(
    reducer: Reducer, tap: Tap, activation: Any, multiplier: Any, g: jax.Array
) -> Part:
    v = wide(canonical_scale(tap.use, activation, g))
    if multiplier is not None:
        v = v * multiplier.reshape(-1).astype(v.dtype)
    example = jnp.sum(v, axis=2)
    if reducer.name == "identity":
        return {"W": tap.use.view.factor * jnp.sum(example, axis=1)}
    out = {"D": jnp.sum(jnp.square(example), axis=1)}
    return {**out, "v": example} if reducer.name == "raw" else out
