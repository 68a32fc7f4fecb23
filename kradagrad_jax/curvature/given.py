"""Statistics that the user made by hand, checked against their layer."""

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.layout import Layer
from kradagrad_jax.curvature.parts import Part


def _stacked(x: jax.Array, layer: Layer, ndim: int) -> jax.Array:
    return x[None] if x.ndim == ndim - 1 and layer.stack == 1 else x


def _misfit(layer: Layer, a: jax.Array, g: jax.Array) -> ValueError:
    return ValueError(
        f"statistics of '{layer.path}' have shapes {a.shape} and {g.shape}; expected "
        f"{layer.stack} of {layer.d_in} (+ 1 with bias) inputs and {layer.d_out} outputs"
    )


def given_rows(layer: Layer, a: jax.Array, g: jax.Array) -> Part:
    """Checked part of rows that are scaled already; see :meth:`Curvature.from_rows`."""
    a, g = _stacked(a, layer, 3), _stacked(g, layer, 3)
    widths = (layer.d_in, layer.d_in + 1) if layer.bias else (layer.d_in,)
    if a.ndim != 3 or g.ndim != 3 or a.shape[:2] != g.shape[:2] or a.shape[0] != layer.stack:
        raise _misfit(layer, a, g)
    if a.shape[2] not in widths or g.shape[2] != layer.d_out:
        raise _misfit(layer, a, g)
    n = a.shape[1]
    if layer.bias and a.shape[2] == layer.d_in:
        one = jnp.full((layer.stack, n, 1), 1 / jnp.sqrt(jnp.asarray(n, a.dtype)), a.dtype)
        a = jnp.concatenate([a, one], axis=2)
    return {
        "a": a[:, :, None],
        "g": g[:, None, :, None],
        "scale": jnp.ones((), g.dtype),
        "P": jnp.ones((layer.stack,), a.dtype),
    }


def given_grams(layer: Layer, a: jax.Array, g: jax.Array) -> Part:
    """Checked part of factors that are scaled already; see :meth:`Curvature.from_grams`."""

    def side(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        one = x.ndim == 1 or (x.ndim == 2 and x.shape[0] == x.shape[1] and x.shape[0] in sizes)
        x = x[None] if one and layer.stack == 1 else x
        fits = x.ndim in (2, 3) and x.shape[0] == layer.stack and set(x.shape[1:]) <= set(sizes)
        if not fits or (x.ndim == 3 and x.shape[1] != x.shape[2]):
            raise _misfit(layer, a, g)
        return x

    inputs = side(a, (layer.d_in, layer.d_in + 1) if layer.bias else (layer.d_in,))
    outputs = side(g, (layer.d_out,))
    return {
        "A" if inputs.ndim == 3 else "Adiag": inputs,
        "G" if outputs.ndim == 3 else "Gdiag": outputs,
        "P": jnp.ones((layer.stack,), inputs.dtype),
    }
