"""One square factor per mode of a block: the state that all Kronecker methods share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.linalg import multiply_modes

Factored = Sequence[bool] | None  # which modes of a block have a factor; None: all


class KronFactor(NamedTuple):
    """Factors of one block of shape ``(n_1, ..., n_k)``; None for a mode without factor.

    Attributes:
      statistics: per mode ``(n_i, n_i)``: what gradients are folded into.
      preconditioners: per mode ``(n_i, n_i)``: what multiplies the gradient.
    """

    statistics: tuple[Any, ...]
    preconditioners: tuple[Any, ...]


def per_mode(function: Callable[..., Any], *columns: Sequence[Any]) -> tuple[Any, ...]:
    """``function(mode, *entries)`` for every mode; None where the first entry is None."""
    rows = enumerate(zip(*columns, strict=True))
    return tuple(None if row[0] is None else function(mode, *row) for mode, row in rows)


def roots_of(
    function: Callable[..., Any], exponents: Sequence[Any], *columns: Sequence[Any]
) -> tuple[Any, ...]:
    """``function(exponent, *entries)`` for every mode with a factor.

    Modes of one length and exponent are gone through in a loop: a decomposition is long to compile.
    """
    alike: dict[Any, list[int]] = {}
    for mode, (e, first) in enumerate(zip(exponents, columns[0], strict=True)):
        if first is not None:
            same = e if isinstance(e, (int, float)) else id(e)
            alike.setdefault((same, first.shape), []).append(mode)
    out: list[Any] = [None] * len(exponents)
    for modes in alike.values():
        rows = [tuple(column[i] for column in columns) for i in modes]
        e = exponents[modes[0]]
        if len(modes) == 1:
            out[modes[0]] = function(e, *rows[0])
            continue
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        found = jax.lax.map(lambda row, e=e: function(e, *row), stacked)
        for place, mode in enumerate(modes):
            out[mode] = jax.tree.map(lambda x, place=place: x[place], found)
    return tuple(out)


def on_modes(
    function: Callable[[int], Any], shape: Sequence[int], factored: Factored = None
) -> tuple[Any, ...]:
    """``function(length)`` for every mode with a factor, None for the others."""
    kept = (True,) * len(shape) if factored is None else factored
    return tuple(function(n) if has else None for n, has in zip(shape, kept, strict=True))


def eye(n: int, dtype: Any) -> jax.Array:
    """The identity, as a preconditioner that changes nothing."""
    return jnp.eye(n, dtype=dtype)


def init_kron(
    shape: tuple[int, ...], scale: Any, dtype: Any, factored: Factored, one: Any = eye
) -> KronFactor:
    """Statistics ``scale * I`` (may be traced), preconditioners ``one(length, dtype)``."""
    scale = jnp.asarray(scale, dtype)
    return KronFactor(
        on_modes(lambda n: scale * jnp.eye(n, dtype=dtype), shape, factored),
        on_modes(lambda n: one(n, dtype), shape, factored),
    )


def apply_square_root(g: jax.Array, roots: Sequence[Any]) -> jax.Array:
    """``g`` times ``P = K K^T`` in every mode, from K."""
    return multiply_modes(multiply_modes(g, roots, transposed=True), roots)
