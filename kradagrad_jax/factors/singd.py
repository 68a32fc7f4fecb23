"""IKFAC, INGD and SINGD on one layer: roots of inverse curvature, moved by products alone.

The inverse curvature of a gradient M: (d_in, d_out) is ``K K^T x C C^T``. A refresh multiplies K
by a first-order ``exp(-b m_K)``, where m_K follows the whitened curvature minus the identity,
projected onto the structure of K; likewise C. Formulas: arXiv 2312.05705, 2302.09738 (INGD).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import BlockMethod, Grams, Rows, Step
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.linalg.structures import Dense, Stored, Structure


class SingdFactor(NamedTuple):
    """State of one layer; every entry is stored in the structure of its side.

    Attributes:
      k: root of the inverse curvature of the inputs, size d_in (with the bias as last row).
      c: root of the inverse curvature of the output gradients, size d_out.
      m_k, m_c: Riemannian momenta; None (no memory) where there is no momentum.
    """

    k: Stored
    c: Stored
    m_k: Stored
    m_c: Stored


class SingdOptions(NamedTuple):
    """Static choices and numbers; see :func:`kradagrad_jax.transforms.singd.scale_by_singd`."""

    structures: tuple[Structure, Structure] = (Dense(), Dense())
    adaptive: bool = True
    damping: Any = 1e-3
    lr_cov: Any = 1e-2
    riemannian_momentum: Any = 0.5
    normalize_lr_cov: str = "none"
    second_order: bool = False
    factor_dtypes: tuple[Any, Any] = (None, None)


def singd_method(o: SingdOptions) -> BlockMethod:
    """The layer method for gradients ``(d_in, d_out)``.

    Statistics are :class:`Rows` or :class:`Grams`. Folding one in IS the refresh: ``refresh`` does
    nothing, the interval T is that of the statistics.
    """
    k_structure, c_structure = o.structures
    momentum = has_momentum(o.riemannian_momentum)

    def init(shape: tuple[int, ...], dtype: Any) -> SingdFactor:
        eyes = [
            s.identity(n, own or dtype)
            for s, n, own in zip(o.structures, shape, o.factor_dtypes, strict=True)
        ]
        zeros = [jax.tree.map(jnp.zeros_like, eye) if momentum else None for eye in eyes]
        return SingdFactor(eyes[0], eyes[1], zeros[0], zeros[1])

    def accumulate(factor: SingdFactor, statistic: Rows | Grams, step: Step) -> SingdFactor:
        rows = isinstance(statistic, Rows)
        sides = [
            _curvature(s, x, root, rows)
            for s, x, root in zip(o.structures, statistic, (factor.k, factor.c), strict=True)
        ]
        moved = [
            _move(o, s, root, old, *own, _trace_weights(o, s_other, other), step)
            for s, s_other, root, old, own, other in (
                (k_structure, c_structure, factor.k, factor.m_k, sides[0], sides[1]),
                (c_structure, k_structure, factor.c, factor.m_c, sides[1], sides[0]),
            )
        ]
        return SingdFactor(moved[0][0], moved[1][0], moved[0][1], moved[1][1])

    def refresh(factor: SingdFactor, step: Step) -> SingdFactor:
        del step
        return factor

    def precondition(factor: SingdFactor, g: jax.Array, step: Step) -> jax.Array:
        del step
        out = k_structure.apply_square(factor.k, g.astype(dtype_of(factor.k)))
        out = c_structure.apply_square(factor.c, out.T.astype(dtype_of(factor.c)))
        return out.T.astype(g.dtype)

    return BlockMethod(init, accumulate, refresh, precondition)


def has_momentum(value: Any) -> bool:
    """Whether a Riemannian momentum needs memory: all but a plain zero do."""
    return not (isinstance(value, (int, float)) and value == 0)


def dtype_of(stored: Stored) -> Any:
    """Dtype of the numbers of a structured matrix."""
    return jax.tree.leaves(stored)[0].dtype


def _curvature(s: Structure, x: jax.Array, root: Stored, rows: bool) -> tuple[Stored, Stored]:
    """P(K^T U K) and P(K^T K)."""
    x = x.astype(dtype_of(root))
    if rows:
        return s.project_gram(s.apply_transposed(root, x.T)), s.ktk(root)
    return s.project_congruence(root, x), s.ktk(root)


def _trace_weights(o: SingdOptions, s: Structure, other: tuple[Stored, Stored]) -> Any:
    """Weights of curvature and damping of one side: mean traces of the other side's."""
    return (s.average(other[0]), s.average(other[1])) if o.adaptive else None


def _move(
    o: SingdOptions,
    s: Structure,
    root: Stored,
    old: Stored,
    h: Stored,
    q: Stored,
    weights: Any,
    step: Step,
) -> tuple[Stored, Stored]:
    """The new root and its momentum."""
    lam = at_step(o.damping, step)
    if weights is not None:
        h, lam = scaled(weights[0], h), lam * weights[1].astype(lam.dtype)
    tangent = s.subtract_identity(jax.tree.map(jnp.add, h, scaled(lam, q)))
    alpha, share = jnp.asarray(o.riemannian_momentum), 0.5
    if o.normalize_lr_cov != "none":
        share = 0.5 * (1 - alpha)
    m = scaled(share, tangent)
    if old is not None:
        m = jax.tree.map(jnp.add, scaled(alpha, old), m)
    b = at_step(o.lr_cov, step)
    if o.normalize_lr_cov != "none":
        b = b / jnp.maximum(1, length(s, m, o.normalize_lr_cov)).astype(b.dtype)
    return moved(s, root, m, b, o.second_order), m if old is not None else None


def scaled(factor: Any, stored: Stored) -> Stored:
    """A scalar times a structured matrix, in the dtype of the latter."""
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, stored)


def length(s: Structure, m: Stored, kind: str) -> jax.Array:
    """What the factor step is divided by where it exceeds one."""
    return s.frobenius(m) if kind == "frobenius" else s.max_entry(m)


def moved(s: Structure, root: Stored, m: Stored, b: jax.Array, second_order: bool) -> Stored:
    """``K (I - b m)``, or with the second term of the exponential ``K (I - b m + (b m)^2 / 2)``."""
    change = s.matmul(root, m)
    out = jax.tree.map(jnp.subtract, root, scaled(b, change))
    if second_order:
        out = jax.tree.map(jnp.add, out, scaled(b * b / 2, s.matmul(change, m)))
    return out
