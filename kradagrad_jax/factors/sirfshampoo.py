"""SIRFShampoo on one tensor: inverse-free roots of Shampoo's statistics without their root.

Every axis n of length d_n > 1 has a factor K_n in a structure; the gradient is preconditioned by
``K_n K_n^T`` on each axis. Formulas: arXiv 2402.03496.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.factors.singd import dtype_of, has_momentum, moved, scaled
from kradagrad_jax.linalg import unfold
from kradagrad_jax.linalg.structures import Stored, Structure


class SirfFactor(NamedTuple):
    """State of one tensor.

    Attributes:
      roots: K_n of every axis longer than one, in its structure.
      momenta: likewise m_n; None (no memory) where there is no Riemannian momentum.
    """

    roots: tuple[Stored, ...]
    momenta: tuple[Stored, ...] | None


class SirfOptions(NamedTuple):
    """Static choices and numbers; see :func:`scale_by_sirfshampoo`.

    ``structures``: dims -> one structure per axis; ``dtypes``: number of axes -> dtype or None per
    axis; ``flatten``: treat the tensor as one long vector.
    """

    structures: Callable[[tuple[int, ...]], tuple[Structure, ...]]
    dtypes: Callable[[int], tuple[Any, ...]]
    flatten: bool = False
    damping: Any = 1e-3
    lr_cov: Any = 1e-2
    riemannian_momentum: Any = 0.5


def sirf_method(o: SirfOptions) -> BlockMethod:
    """The method for gradient blocks of any order; the statistic is ``sqrt(batch size) * G``.

    Folding a statistic in IS the refresh: ``refresh`` does nothing.
    """
    momentum = has_momentum(o.riemannian_momentum)

    def dims_of(shape: tuple[int, ...]) -> tuple[int, ...]:
        if o.flatten:
            return (math.prod(shape),)
        return tuple(d for d in shape if d != 1) or (1,)

    def init(shape: tuple[int, ...], dtype: Any) -> SirfFactor:
        dims = dims_of(shape)
        structures, dtypes = o.structures(dims), o.dtypes(len(dims))
        roots = tuple(
            s.identity(d, own or dtype) for s, d, own in zip(structures, dims, dtypes, strict=True)
        )
        return SirfFactor(roots, jax.tree.map(jnp.zeros_like, roots) if momentum else None)

    def accumulate(factor: SirfFactor, statistic: jax.Array, step: Step) -> SirfFactor:
        y = statistic.reshape(dims_of(statistic.shape))
        structures = o.structures(y.shape)
        for n, (s, root) in enumerate(zip(structures, factor.roots, strict=True)):
            y = _on_axis(s.apply_transposed, root, y, n)
        # mean traces of K^T K
        pairs = zip(structures, factor.roots, y.shape, strict=True)
        traces = [s.frobenius(root) ** 2 / d for s, root, d in pairs]
        roots, momenta = [], []
        for n, (s, root) in enumerate(zip(structures, factor.roots, strict=True)):
            lam = at_step(o.damping, step) * math.prod(traces[:n] + traces[n + 1 :])
            m = _tangent(s, root, y, n, lam)
            if factor.momenta is not None:
                alpha = jnp.asarray(o.riemannian_momentum)
                kept = scaled(alpha, factor.momenta[n])
                m = jax.tree.map(jnp.add, kept, scaled(1 - alpha, m))
            b = at_step(o.lr_cov, step)
            b = b / jnp.maximum(1, s.frobenius(m)).astype(b.dtype)
            roots.append(moved(s, root, m, b, second_order=False))
            momenta.append(m)
        return SirfFactor(tuple(roots), None if factor.momenta is None else tuple(momenta))

    def refresh(factor: SirfFactor, step: Step) -> SirfFactor:
        del step
        return factor

    def precondition(factor: SirfFactor, g: jax.Array, step: Step) -> jax.Array:
        del step
        z = g.reshape(dims_of(g.shape))
        for n, (s, root) in enumerate(zip(o.structures(z.shape), factor.roots, strict=True)):
            z = _on_axis(s.apply_square, root, z, n)
        return z.reshape(g.shape).astype(g.dtype)

    return BlockMethod(init, accumulate, refresh, precondition)


def _tangent(s: Structure, root: Stored, y: jax.Array, n: int, lam: jax.Array) -> Stored:
    """Half of whitened curvature plus damping minus the identity, projected.

    The weight d_n / D of the curvature is applied to y: the product then has the size of a mean.
    """
    d, dtype = y.shape[n], dtype_of(root)
    rows = unfold(y, n).astype(dtype) * jnp.asarray(math.sqrt(d / y.size), dtype)
    h = jax.tree.map(jnp.add, s.project_gram(rows), scaled(lam, s.ktk(root)))
    return scaled(0.5, s.subtract_identity(h))


def _on_axis(product: Callable[..., jax.Array], root: Stored, x: jax.Array, n: int) -> jax.Array:
    """A structured matrix times one axis of a tensor, in the dtype of the matrix."""
    moved_axis = jnp.moveaxis(x, n, 0)
    rows = moved_axis.reshape(x.shape[n], -1).astype(dtype_of(root))
    return jnp.moveaxis(product(root, rows).reshape(moved_axis.shape), 0, n)
