"""SIRFShampoo on one tensor: inverse-free roots of Shampoo's statistics without their root.

Every axis n of length d_n > 1 has a factor K_n in a structure; the gradient is preconditioned by
``K_n K_n^T`` on each axis. Formulas: arXiv 2402.03496.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.kron import Factored
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.moving import Moves, dtype_of, move_roots, starting_momenta, tangent
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.linalg import unfold
from kradagrad_jax.linalg.structures import Stored, Structure


class SirfFactor(NamedTuple):
    """State of one tensor."""

    # K_n of every axis longer than one, in its structure; None for one without factor
    roots: tuple[Stored, ...]
    # likewise m_n; None (no memory) where there is no Riemannian momentum
    momenta: tuple[Stored, ...] | None


class SirfOptions(NamedTuple):
    """Static choices and numbers; see :func:`scale_by_sirfshampoo`.

    ``structures``: dims -> one structure per axis; ``dtypes``: number of axes -> dtype or None per
    axis; ``flatten``: treat the tensor as one long vector. ``name``: of the structures, for the
    name of the method.
    """

    structures: Callable[[tuple[int, ...]], tuple[Structure, ...]]
    dtypes: Callable[[int], tuple[Any, ...]]
    flatten: bool = False
    damping: Any = 1e-3
    lr_cov: Any = 1e-2
    riemannian_momentum: Any = 0.5
    name: str = ""


def sirf_method(o: SirfOptions) -> BlockMethod:
    """The method for gradient blocks of any order; the statistic is ``sqrt(batch size) * G``.

    Folding a statistic in IS the refresh: there is no other. An axis without factor is left alone,
    as by K_n = I. The roots share their scale freely and are kept in balance.
    """
    moves = Moves(o.lr_cov, o.riemannian_momentum, "frobenius", averaged=True)

    def dims_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        if o.flatten:
            return (math.prod(shape),)
        return tuple(d for d in shape if d != 1) or (1,)

    def kept(shape: tuple[int, ...], factored: Factored) -> tuple[bool, ...]:
        """Per axis of :func:`dims_of`, whether it has a factor."""
        has = (True,) * len(shape) if factored is None else tuple(factored)
        if o.flatten:
            return (all(has),)
        return tuple(f for d, f in zip(shape, has, strict=True) if d != 1) or (any(has),)

    def init(shape: tuple[int, ...], dtype: Any, factored: Factored = None) -> SirfFactor:
        dims = dims_of(shape)
        rows = zip(
            o.structures(dims), dims, o.dtypes(len(dims)), kept(shape, factored), strict=True
        )
        roots = tuple(s.identity(d, own or dtype) if has else None for s, d, own, has in rows)
        momenta = starting_momenta(o.riemannian_momentum, roots)
        return SirfFactor(roots, None if all(m is None for m in momenta) else momenta)

    def accumulate(factor: SirfFactor, statistic: jax.Array, step: Step) -> SirfFactor:
        y = statistic.reshape(dims_of(statistic.shape))
        structures, roots = o.structures(y.shape), factor.roots
        y = _on_axes(structures, roots, y, "apply_transposed")
        # mean traces of K^T K
        traces = [
            1.0 if root is None else s.frobenius(root) ** 2 / d
            for s, root, d in zip(structures, roots, y.shape, strict=True)
        ]
        lam, tangents = at_step(o.damping, step), []
        for n, (s, root) in enumerate(zip(structures, roots, strict=True)):
            shift = lam * math.prod(traces[:n] + traces[n + 1 :])
            tangents.append(None if root is None else _tangent(s, root, y, n, shift))
        momenta = factor.momenta or (None,) * len(roots)
        roots, momenta = move_roots(moves, structures, roots, momenta, tangents, step)
        return SirfFactor(roots, None if factor.momenta is None else momenta)

    def precondition(factor: SirfFactor, g: jax.Array, step: Step) -> jax.Array:
        del step
        z = g.reshape(dims_of(g.shape))
        z = _on_axes(o.structures(z.shape), factor.roots, z, "apply_square")
        return z.reshape(g.shape).astype(g.dtype)

    return BlockMethod(
        init, accumulate, None, precondition, name=f"sirfshampoo({o.name})", partial=True
    )


def _tangent(s: Structure, root: Stored, y: jax.Array, n: int, lam: jax.Array) -> Stored:
    """The tangent of axis n, of ``y`` that is whitened on all axes.

    The weight d_n / D of the curvature is applied to y: the product then has the size of a mean.
    """
    d, dtype = y.shape[n], dtype_of(root)
    rows = unfold(y, n).astype(dtype) * jnp.asarray(math.sqrt(d / y.size), dtype)
    return tangent(s, s.project_gram(rows), lam, root)


def _on_axes(
    structures: Sequence[Structure], roots: Sequence[Stored], x: jax.Array, product: str
) -> jax.Array:
    """A product with the root of every axis that has one, in the dtype of the root."""
    for n, (s, root) in enumerate(zip(structures, roots, strict=True)):
        if root is not None:
            moved_axis = jnp.moveaxis(x, n, 0)
            rows = moved_axis.reshape(x.shape[n], -1).astype(dtype_of(root))
            out = getattr(s, product)(root, rows)
            x = jnp.moveaxis(out.reshape(moved_axis.shape), 0, n)
    return x
