"""Low-rank K-FAC on one layer: RS-, SRE-KFAC (sketches) and the Brand K-FACs (online updates).

Each side (inputs A, output gradients G) keeps its strongest eigenpairs. A *tracked* side follows
the average online, from the rows of the batch alone; the others keep the dense average and
decompose it now and then. Formulas: arXiv 2206.15397 and 2210.08494.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax import linalg
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online
from kradagrad_jax.factors.method import BlockMethod, Grams, Rows, Step
from kradagrad_jax.factors.numbers import at_step, share_of_newest


class Side(NamedTuple):
    """State of one factor of size d."""

    # (d, d) average of the statistics; None where the pairs are tracked without it
    m: jax.Array | None
    pairs: linalg.LowRank  # stored eigenpairs, (R,) and (d, R); unused ones are zero
    valid: jax.Array  # number of pairs in use, int32


class LowRankFactor(NamedTuple):
    """State of one layer: inputs and output gradients."""

    a: Side
    g: Side


def is_tracked(o: LowRankOptions, d: int) -> bool:
    """Whether a side of size d is followed online: else a decomposition is cheaper."""
    return o.online is not None and o.sketch.rank + o.columns < d


def stored_pairs(o: LowRankOptions, d: int) -> int:
    """Number R of pairs that are kept for a side of size d."""
    if o.online is not None and is_tracked(o, d):
        return o.sketch.rank + (o.columns if o.online.truncate == "before" else 0)
    return min(o.sketch.rank, d)


def low_rank_method(o: LowRankOptions) -> BlockMethod:
    """The layer method for gradients ``(d_in, d_out)``.

    Statistics are :class:`Rows`, or :class:`Grams` where nothing is tracked.
    """

    def init(shape: tuple[int, ...], dtype: Any) -> LowRankFactor:
        return LowRankFactor(*(_init_side(o, d, dtype) for d in shape))

    def accumulate(factor: LowRankFactor, statistic: Rows | Grams, step: Step) -> LowRankFactor:
        shape = tuple(s.pairs.u.shape[0] for s in factor)
        return LowRankFactor(
            *(
                _observe(o, side, x, isinstance(statistic, Rows), step, (i, shape))
                for i, (side, x) in enumerate(zip(factor, statistic, strict=True))
            )
        )

    def refresh(factor: LowRankFactor, step: Step) -> LowRankFactor:
        shape = tuple(s.pairs.u.shape[0] for s in factor)
        return LowRankFactor(
            *(_decompose(o, side, step, (i, shape)) for i, side in enumerate(factor))
        )

    def precondition(factor: LowRankFactor, g: jax.Array, step: Step) -> jax.Array:
        return solve_side(o, factor.g, solve_side(o, factor.a, g, step).T, step).T

    def cost(shape: tuple[int, ...]) -> float:
        return float(sum(0 if is_tracked(o, d) else d * d * min(o.sketch.rank, d) for d in shape))

    kinds = ("overwrite", o.overwrite), ("correct", o.correct)
    parts = [o.decomposition, o.start, *(name for name, on in kinds if on)]
    if o.online is not None:
        parts.append("online")
    name = f"low_rank_kfac({', '.join(parts)})"
    return BlockMethod(init, accumulate, refresh, precondition, cost, name=name)


def solve_side(o: LowRankOptions, side: Side, x: jax.Array, step: Step) -> jax.Array:
    """Damped inverse of one side times ``x: (d, k)``, in time linear in d."""
    w, dtype = side.pairs.w, x.dtype
    floor = w[jnp.maximum(side.valid - 1, 0)] if o.continuation else jnp.zeros((), dtype)
    damping = at_step(o.damping, step, dtype) * jnp.max(w)
    if o.start == "counted":  # what is missing of an average that started at the identity
        number = folded(o, len(side.pairs.u), step).astype(dtype)
        damping = damping + jnp.asarray(o.ema, dtype) ** number
    return linalg.low_rank_solve(side.pairs, x, jnp.where(damping > 0, damping, 1), floor)


def folded(o: LowRankOptions, d: int, step: Step) -> jax.Array:
    """Statistics in the pairs of a side of size d: all, or every so many if it is tracked."""
    if o.online is None or not is_tracked(o, d):
        return step.statistics
    return (step.statistics - 1) // o.online.every + 1


def _init_side(o: LowRankOptions, d: int, dtype: Any) -> Side:
    size, tracked = stored_pairs(o, d), is_tracked(o, d)
    dense = not tracked or o.overwrite or o.correct
    start = 1.0 if o.start == "identity" and not tracked else 0.0
    return Side(
        start * jnp.eye(d, dtype=dtype) if dense else None,
        linalg.LowRank(jnp.zeros(size, dtype), jnp.eye(d, size, dtype=dtype)),
        jnp.asarray(size, jnp.int32),
    )


def _observe(
    o: LowRankOptions, side: Side, x: jax.Array, rows: bool, step: Step, place: tuple[int, Any]
) -> Side:
    """Folds a statistic in: rows (n, d), or a Gram matrix (d, d)."""
    m = side.m
    if m is not None:
        new = share_of_newest(o.start, o.ema, step.statistics, m.dtype)
        m = (1 - new) * m + new * (linalg.matmul(x.T, x) if rows else x)
    if o.online is None or not is_tracked(o, side.pairs.u.shape[0]):
        return side._replace(m=m)
    if not rows or x.shape[0] != o.columns:
        have = f"{x.shape[0]} rows" if rows else "Gram matrices"
        raise ValueError(
            f"online low-rank updates were set up for {o.columns} rows per statistic, got {have}: "
            "give Online(batch_size=...), and capture with reducer='raw'"
        )
    online = o.online
    known = m if online.correct_with_batch else side.m
    # also where a refresh will overwrite the pairs: the dense average holds the statistic as well
    pairs, valid = linalg.when(
        (step.statistics - 1) % online.every == 0,
        lambda old: _follow(o, online, Side(m, *old), known, x, step, place),
        (side.pairs, side.valid),
    )
    return Side(m, pairs, valid)


def _follow(
    o: LowRankOptions,
    online: Online,
    side: Side,
    m: jax.Array | None,
    rows: jax.Array,
    step: Step,
    place: tuple[int, Any],
) -> tuple[linalg.LowRank, jax.Array]:
    """The online update of a tracked side, and the light correction where it is due."""
    new = share_of_newest(o.start, o.ema, folded(o, len(side.pairs.u), step), rows.dtype)
    most = o.sketch.rank
    rank = _active_rank(o, step, most)
    kept = _first(linalg.LowRank(side.pairs.w[:most], side.pairs.u[:, :most]), rank)
    pairs = linalg.brand_update(linalg.LowRank((1 - new) * kept.w, kept.u), jnp.sqrt(new) * rows.T)
    valid = rank + o.columns
    pairs = _first(pairs, valid)
    if online.truncate == "after":
        pairs, valid = _first(linalg.LowRank(pairs.w[:most], pairs.u[:, :most]), rank), rank
    if o.correct and m is not None:
        updates = (step.statistics - 1) // online.every
        pairs = linalg.when(
            (updates > 0) & (updates % online.correct_every == 0),
            lambda pairs: linalg.correct(pairs, m, _pick(o, online, pairs, step, place)),
            pairs,
        )
    return pairs, jnp.asarray(valid, jnp.int32)


def _decompose(o: LowRankOptions, side: Side, step: Step, place: tuple[int, Any]) -> Side:
    """New pairs of a dense average; of a tracked side only where it is overwritten."""
    if side.m is None:
        return side
    d, stored = side.pairs.u.shape
    m, how = side.m, o.sketch
    rank, width = min(how.rank, d), min(how.rank + how.oversampling, d)

    def decompose(_: Any) -> tuple[linalg.LowRank, jax.Array]:
        omega = _test_matrix(o, (d, width), m.dtype, step, place)
        active, used = _active_rank(o, step, rank), None
        if how.rank_schedule is not None or how.oversampling_schedule is not None:
            extra = how.oversampling_schedule or (lambda count: how.oversampling)
            used = jnp.minimum(active + extra(step.count - 1), width)
        if o.decomposition == "sre":
            pairs = linalg.symmetric_sketch(m, omega, rank, how.power, used, how.orthonormalize)
        else:
            pairs = linalg.randomized_svd(m, omega, rank, how.power, used)
        pairs = _first(pairs, active)
        pad = stored - rank
        padded = linalg.LowRank(jnp.pad(pairs.w, (0, pad)), jnp.pad(pairs.u, ((0, 0), (0, pad))))
        return padded, jnp.asarray(active, jnp.int32)

    old = (side.pairs, side.valid)
    if o.online is None or not is_tracked(o, d):
        pairs, valid = decompose(old)
    elif not o.overwrite:
        return side
    else:
        due = (step.refreshes > 0) & (step.refreshes % o.online.overwrite_every == 0)
        pairs, valid = linalg.when(due, decompose, old)
    return side._replace(pairs=pairs, valid=valid)


def _active_rank(o: LowRankOptions, step: Step, rank: int) -> Any:
    schedule = o.sketch.rank_schedule
    if schedule is None:
        return rank
    return jnp.clip(jnp.asarray(schedule(step.count - 1)).astype(jnp.int32), 1, rank)


def _first(pairs: linalg.LowRank, number: Any) -> linalg.LowRank:
    """The first pairs, the others set to zero."""
    if isinstance(number, int) and number >= pairs.w.shape[0]:
        return pairs
    keep = jnp.arange(pairs.w.shape[0]) < number
    return linalg.LowRank(jnp.where(keep, pairs.w, 0), jnp.where(keep[None, :], pairs.u, 0))


def _key(o: LowRankOptions, step: Step, place: tuple[int, Any], purpose: int) -> jax.Array:
    """Random key of a step and side; that of a layer does not depend on the other layers."""
    key = jax.random.fold_in(jax.random.key(o.sketch.seed), step.count)
    side, shape = place
    return jax.random.fold_in(key, 4 * math.prod(shape) + 2 * side + purpose)


def _test_matrix(
    o: LowRankOptions, shape: tuple[int, int], dtype: Any, step: Step, place: tuple[int, Any]
) -> jax.Array:
    if o.sketch.draw is not None:
        return o.sketch.draw(step.count - 1, place[1], place[0]).astype(dtype)
    return jax.random.normal(_key(o, step, place, 0), shape, dtype)


def _pick(
    o: LowRankOptions, online: Online, pairs: linalg.LowRank, step: Step, place: tuple[int, Any]
) -> jax.Array:
    """Positions of the pairs that are corrected."""
    if online.pick is not None:
        return online.pick(step.count - 1, place[1], place[0])
    size = pairs.w.shape[0]
    number = min(round(online.corrected_share * size + 1), size)
    return jax.random.permutation(_key(o, step, place, 1), size)[:number]
