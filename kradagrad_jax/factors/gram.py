"""Shampoo's factors: Gram statistics, or their square root in array form, and inverse roots."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.exponents import shared_out, with_factor
from kradagrad_jax.factors.kron import (
    Factored,
    KronFactor,
    apply_square_root,
    init_kron,
    per_mode,
    roots_of,
)
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import averaged, total_weight, weights
from kradagrad_jax.factors.roots import make_root
from kradagrad_jax.linalg import mode_gram, sr_update, svd_root, symmetrize, unfold, when


@dataclasses.dataclass(frozen=True)
class SquareRoot:
    """Square-root (array-form) statistics: a triangular R with R^T R = S, updated by QR.

    Attributes:
      fold_every: number of gradients that are kept and folded in by one QR. 1 folds at once;
        more keep that many gradient blocks in memory and cost fewer factorisations. The result
        is the same.
    """

    fold_every: int = 1

    def __post_init__(self):
        if self.fold_every < 1:
            raise ValueError(f"SquareRoot.fold_every must be at least 1, got {self.fold_every}")


def gram_method(
    *,
    beta2: Any,
    damping: Any,
    damping_rule: Any,
    initial: Any,
    exponent: Any,
    root: str,
    bias_correction: bool,
) -> BlockMethod:
    """Shampoo with Gram statistics ``S_i = sum w_j U_j U_j^T`` (arXiv 1802.09568, Algorithm 2)."""
    how = make_root(root, damping, damping_rule)

    def init(shape: tuple[int, ...], dtype: Any, factored: Factored = None) -> KronFactor:
        kept = with_factor(shape, factored, exponent)
        return init_kron(shape, initial, dtype, kept, how.init)

    def accumulate(factor: KronFactor, g: jax.Array, step: Step) -> KronFactor:
        old, new = weights(beta2, g.dtype)
        return factor._replace(
            statistics=per_mode(lambda i, s: old * s + new * mode_gram(g, i), factor.statistics)
        )

    def refresh(factor: KronFactor, step: Step) -> KronFactor:
        def one(e: Any, s: jax.Array, old: Any) -> Any:
            scale = 1.0
            if bias_correction:
                scale = 1 / total_weight(beta2, step.statistics, s.dtype)
            return how.compute(symmetrize(s * scale), old, -e, step.refreshes == 0)

        e = shared_out(factor.statistics, exponent)
        return factor._replace(
            preconditioners=roots_of(one, e, factor.statistics, factor.preconditioners)
        )

    return BlockMethod(
        init=init,
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: how.apply(g, factor.preconditioners),
        name=f"shampoo(gram, {root}, {averaged(beta2)})",
        partial=True,
    )


class PendingFactor(NamedTuple):
    """Array-form factors with gradients that are not folded in yet."""

    # per mode R ``(n_i, n_i)``, upper triangular, ``R^T R`` = statistic; None for a mode without
    # factor
    statistics: tuple[Any, ...]
    preconditioners: tuple[Any, ...]  # per mode K ``(n_i, n_i)`` with ``P = K K^T``
    pending: jax.Array  # ``(fold_every, *block shape)``: weighted gradients, zero where unused


def _rows(g: jax.Array, mode: int) -> jax.Array:
    """Unfolding of mode ``mode`` of a stack of blocks, ``(n_mode, stack * rest)``."""
    return unfold(g, mode + 1)


def array_method(
    form: SquareRoot,
    *,
    beta2: Any,
    damping: Any,
    damping_rule: Any,
    initial: Any,
    exponent: Any,
    bias_correction: bool,
) -> BlockMethod:
    """Shampoo with square-root statistics: float32 with the quality of float64.

    The state holds R with ``R^T R = S`` and is updated by QR of ``[sqrt(b) R; sqrt(w) U^T]``; the
    root comes from the singular values of R. The preconditioner is kept as K with P = K K^T and
    applied in two products per mode: assembled, its rounding errors would reach all directions.
    """
    k = form.fold_every
    safeguard: dict[str, Any] = {"floor": 0.0, "damping": damping}
    if damping_rule == "clamp":
        safeguard = {"floor": damping, "damping": 0.0}
    safeguard["relative"] = damping_rule == "relative"

    def init(shape: tuple[int, ...], dtype: Any, factored: Factored = None) -> Any:
        start = jnp.sqrt(jnp.asarray(initial, dtype))
        plain = init_kron(shape, start, dtype, with_factor(shape, factored, exponent))
        return plain if k == 1 else PendingFactor(*plain, jnp.zeros((k, *shape), dtype))

    def fold(statistics: tuple[Any, ...], pending: jax.Array, age: Any) -> tuple[Any, ...]:
        """Statistics with the pending rows in; ``age`` = how many gradients these are."""
        old = jnp.sqrt(weights(beta2, pending.dtype)[0] ** age)
        return per_mode(lambda i, r: sr_update(old * r, _rows(pending, i)), statistics)

    def accumulate(factor: Any, g: jax.Array, step: Step) -> Any:
        old, new = weights(beta2, g.dtype)
        weighted = jnp.sqrt(new) * g
        if k == 1:
            return factor._replace(statistics=fold(factor.statistics, weighted[None], 1))
        slot = (step.statistics - 1) % k
        pending = (jnp.sqrt(old) * factor.pending).at[slot].set(weighted)
        full = slot == k - 1
        statistics = when(full, lambda s, p: fold(s, p, k), factor.statistics, pending)
        return factor._replace(statistics=statistics, pending=jnp.where(full, 0, pending))

    def refresh(factor: Any, step: Step) -> Any:
        statistics = factor.statistics
        if k > 1:  # gradients still pending count already, but stay pending
            age = step.statistics % k
            statistics = when(
                age > 0,
                lambda s, p: fold(s, p, age.astype(p.dtype)),
                statistics,
                factor.pending,
            )

        def one(mode: int, r: jax.Array, e: Any) -> jax.Array:
            scale = jnp.ones((), r.dtype)
            if bias_correction:
                scale = 1 / total_weight(beta2, step.statistics, r.dtype)
            return svd_root(jnp.sqrt(scale) * r, -e, **safeguard)

        e = shared_out(statistics, exponent)
        return factor._replace(preconditioners=per_mode(one, statistics, e))

    return BlockMethod(
        init=init,
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: apply_square_root(g, factor.preconditioners),
        refresh_cost=lambda shape: 2.0 * sum(n**3 for n in shape),
        name=f"shampoo(square_root, {averaged(beta2)})",
        partial=True,
    )
