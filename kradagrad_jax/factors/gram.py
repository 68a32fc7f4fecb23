"""Shampoo's factors: Gram statistics, or their square root in array form, and inverse roots."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.kron import KronFactor, apply_square_root, init_kron
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.roots import default_exponent, make_root, unless_zero
from kradagrad_jax.linalg import mode_gram, sr_update, svd_root, symmetrize, unfold


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


def _weights(beta2: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of the old statistic and of the new one; ``beta2 = 1`` means a sum."""
    b = jnp.asarray(beta2, dtype)
    return b, jnp.where(b == 1, jnp.ones_like(b), 1 - b)


def _bias(beta2: Any, taken: jax.Array, dtype: Any) -> jax.Array:
    """Sum of the weights of an average after ``taken`` statistics; 1 for a sum."""
    b = jnp.asarray(beta2, dtype)
    correction = 1 - b ** jnp.maximum(taken, 1).astype(dtype)
    return jnp.where(b == 1, jnp.ones_like(b), correction)


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

    def accumulate(factor: KronFactor, g: jax.Array, step: Step) -> KronFactor:
        old, new = _weights(beta2, g.dtype)
        return factor._replace(
            statistics=tuple(
                old * s + new * mode_gram(g, i) for i, s in enumerate(factor.statistics)
            )
        )

    def refresh(factor: KronFactor, step: Step) -> KronFactor:
        shape = tuple(s.shape[0] for s in factor.statistics)
        e = default_exponent(shape, exponent, -0.5)
        scale = 1.0
        if bias_correction:
            scale = 1 / _bias(beta2, step.statistics_count, factor.statistics[0].dtype)
        return factor._replace(
            preconditioners=tuple(
                unless_zero(s, how.compute(symmetrize(s * scale), p, e, step), p)
                for s, p in zip(factor.statistics, factor.preconditioners, strict=True)
            )
        )

    return BlockMethod(
        init=lambda shape, dtype: init_kron(shape, initial, dtype),
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: how.apply(factor, g),
    )


class PendingFactor(NamedTuple):
    """Array-form factors with gradients that are not folded in yet.

    Attributes:
      statistics: per mode R ``(n_i, n_i)``, upper triangular, ``R^T R`` = statistic.
      preconditioners: per mode K ``(n_i, n_i)`` with ``P = K K^T``.
      pending: ``(fold_every, *block shape)``: weighted gradients, zero where unused.
    """

    statistics: tuple[jax.Array, ...]
    preconditioners: tuple[jax.Array, ...]
    pending: jax.Array


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

    def init(shape: tuple[int, ...], dtype: Any) -> Any:
        plain = init_kron(shape, jnp.sqrt(jnp.asarray(initial, dtype)), dtype)
        return plain if k == 1 else PendingFactor(*plain, jnp.zeros((k, *shape), dtype))

    def fold(factor: Any, pending: jax.Array, age: Any) -> tuple[jax.Array, ...]:
        """Statistics with the pending rows in; ``age`` = how many gradients these are."""
        old = _weights(beta2, pending.dtype)[0] ** age
        return tuple(
            sr_update(jnp.sqrt(old) * r, _rows(pending, i)) for i, r in enumerate(factor.statistics)
        )

    def accumulate(factor: Any, g: jax.Array, step: Step) -> Any:
        old, new = _weights(beta2, g.dtype)
        weighted = jnp.sqrt(new) * g
        if k == 1:
            return factor._replace(statistics=fold(factor, weighted[None], 1))
        slot = (step.statistics_count - 1) % k
        pending = (jnp.sqrt(old) * factor.pending).at[slot].set(weighted)

        def full() -> Any:
            return fold(factor, pending, k), jnp.zeros_like(pending)

        statistics, pending = jax.lax.cond(
            slot == k - 1, full, lambda: (factor.statistics, pending)
        )
        return factor._replace(statistics=statistics, pending=pending)

    def refresh(factor: Any, step: Step) -> Any:
        statistics = factor.statistics
        if k > 1:  # gradients still pending count already, but stay pending
            age = step.statistics_count % k
            statistics = jax.lax.cond(
                age > 0,
                lambda: fold(factor, factor.pending, age.astype(factor.pending.dtype)),
                lambda: statistics,
            )
        dtype = statistics[0].dtype
        e = default_exponent(tuple(r.shape[0] for r in statistics), exponent, -0.5)
        scale = jnp.ones((), dtype)
        if bias_correction:
            scale = 1 / _bias(beta2, step.statistics_count, dtype)
        return factor._replace(
            preconditioners=tuple(
                unless_zero(r, svd_root(jnp.sqrt(scale) * r, e, **safeguard), p)
                for r, p in zip(statistics, factor.preconditioners, strict=True)
            )
        )

    return BlockMethod(
        init=init,
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: apply_square_root(
            KronFactor(factor.statistics, factor.preconditioners), g
        ),
        refresh_cost=lambda shape: 2.0 * sum(n**3 for n in shape),
    )
