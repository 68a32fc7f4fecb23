"""IKFAC, INGD and SINGD on one layer: roots of inverse curvature, moved by products alone.

The inverse curvature of a gradient M: (d_in, d_out) is ``K K^T x C C^T``. A refresh multiplies K
by a first-order ``exp(-b m_K)``, where m_K follows the whitened curvature minus the identity,
projected onto the structure of K; likewise C. Formulas: arXiv 2312.05705, 2302.09738 (INGD).
K and C of INGD and SINGD share their scale freely and are kept in balance; those of IKFAC, which
are damped inverses one by one, are not.
"""

from typing import Any, NamedTuple

import jax

from kradagrad_jax.factors.method import BlockMethod, Grams, Rows, Step
from kradagrad_jax.factors.moving import (
    Moves,
    dtype_of,
    move_roots,
    scaled,
    starting_momenta,
    tangent,
)
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.linalg.structures import Dense, Stored, Structure


class SingdFactor(NamedTuple):
    """State of one layer; every entry is stored in the structure of its side."""

    k: Stored  # root of the inverse curvature of the inputs, size d_in (with the bias as last row)
    c: Stored  # root of the inverse curvature of the output gradients, size d_out
    # Riemannian momenta; None (no memory) where there is no momentum
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

    Statistics are :class:`Rows` or :class:`Grams`. Folding one in IS the refresh: there is no
    other, the interval T is that of the statistics.
    """
    k_structure, c_structure = o.structures
    averaged = o.normalize_lr_cov != "none"
    moves = Moves(
        o.lr_cov, o.riemannian_momentum, o.normalize_lr_cov, o.second_order, averaged, o.adaptive
    )

    def init(shape: tuple[int, ...], dtype: Any) -> SingdFactor:
        eyes = [
            s.identity(n, own or dtype)
            for s, n, own in zip(o.structures, shape, o.factor_dtypes, strict=True)
        ]
        return SingdFactor(*eyes, *starting_momenta(o.riemannian_momentum, eyes))

    def accumulate(factor: SingdFactor, statistic: Rows | Grams, step: Step) -> SingdFactor:
        rows, roots = isinstance(statistic, Rows), (factor.k, factor.c)
        whitened = [
            _whitened(s, x, root, rows)
            for s, x, root in zip(o.structures, statistic, roots, strict=True)
        ]
        lam, tangents = at_step(o.damping, step), []
        for i, (s, h, root) in enumerate(zip(o.structures, whitened, roots, strict=True)):
            shift, other = lam, o.structures[1 - i]
            if o.adaptive:  # curvature and damping weigh as the mean traces of the other side's
                h = scaled(other.average(whitened[1 - i]), h)
                shift = lam * other.average(other.ktk(roots[1 - i])).astype(lam.dtype)
            tangents.append(tangent(s, h, shift, root))
        roots, momenta = move_roots(
            moves, o.structures, roots, (factor.m_k, factor.m_c), tangents, step
        )
        return SingdFactor(*roots, *momenta)

    def precondition(factor: SingdFactor, g: jax.Array, step: Step) -> jax.Array:
        del step
        out = k_structure.apply_square(factor.k, g.astype(dtype_of(factor.k)))
        out = c_structure.apply_square(factor.c, out.T.astype(dtype_of(factor.c)))
        return out.T.astype(g.dtype)

    names = "|".join(s.name for s in o.structures)
    kind = "singd" if o.adaptive else "ikfac"
    return BlockMethod(init, accumulate, None, precondition, name=f"{kind}({names})")


def _whitened(s: Structure, x: jax.Array, root: Stored, rows: bool) -> Stored:
    """P(K^T U K)."""
    x = x.astype(dtype_of(root))
    if rows:
        return s.project_gram(s.apply_transposed(root, x.T))
    return s.project_congruence(root, x)
