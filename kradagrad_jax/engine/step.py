"""One update: cut, fold, refresh, apply, graft, paste."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import placement, rest, timing, trees
from kradagrad_jax.engine.apply import apply
from kradagrad_jax.engine.cut import cut, paste
from kradagrad_jax.engine.fold import fold, per_block
from kradagrad_jax.engine.graft import lengthen
from kradagrad_jax.engine.layout import factor_dtype_of
from kradagrad_jax.engine.placement import Share
from kradagrad_jax.engine.refresh import refresh
from kradagrad_jax.engine.state import BlockState, Kept
from kradagrad_jax.engine.static import Options, Static, static_of
from kradagrad_jax.engine.timing import Now

Stacks = dict[str, Any]
SMALL = 2**16  # entries; leaves without blocks up to this size are looked at together


def update(
    o: Options, updates: Any, state: BlockState, params: Any, extra: dict[str, Any]
) -> tuple[Any, BlockState]:
    """Preconditioned updates and the next state. See :func:`scale_by_blocks`."""
    leaves, treedef = trees.flatten(updates)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    raw = [leaves[i] for i in real]
    count = jnp.asarray(optax.safe_increment(state.count))
    if not real:
        return updates, state._replace(count=count)
    s = static_of(o, updates, state, params)
    blocks = cut(s.plan, _whole(s, raw))
    usable = _usable(s, blocks, raw)
    statistics, fresh = _statistics(s, blocks, extra)
    skipped = state.skipped + jnp.where(usable, 0, 1).astype(jnp.int32)
    now = Now(
        count, jnp.maximum(count - skipped, 1), usable, fresh,
        *(timing.interval_at(x, count) for x in (o.refresh_every, o.statistics_every)),
    )  # fmt: skip

    kept, directions, rejected = _work(s, now, state.kept(), blocks, statistics)
    out = _whole(s, paste(s.plan, directions))
    moments, others = rest.step(s, now, state.rest, leaves, real)
    fallback, theirs = rest.run_fallback(s, now, state.fallback, updates, params, extra)
    out = out | others | theirs
    for j, i in enumerate(real):
        leaves[i] = trees.place_like(out[j].astype(leaves[i].dtype), leaves[i])
    return treedef.unflatten(leaves), state.keeping(
        kept,
        count=count,
        skipped=skipped,
        rejected=state.rejected + rejected,
        rest=moments,
        fallback=fallback,
    )


def _work(
    s: Static, now: Now, kept: dict[str, Kept], blocks: Stacks, statistics: Stacks
) -> tuple[dict[str, Kept], Stacks, jax.Array]:
    """Everything between cutting and pasting; what is kept, directions, number of rejections."""
    last = s.options.refresh == "last"

    def change(share: Share, now: Now, kept: Stacks, blocks: Stacks, statistics: Stacks) -> Any:
        kept, taken, bad = fold(s, now, kept, blocks, statistics)
        kept, more = (kept, {}) if last else refresh(s, now, kept, statistics, taken)
        return _zipped(kept, taken), (bad, more)

    def use(share: Share, now: Now, kept: Stacks, blocks: Stacks) -> Any:
        kept, applied, bad = apply(s, now, kept, blocks)
        return _zipped(*lengthen(s, share, now, kept, blocks, applied)), (bad,)

    def close(share: Share, now: Now, kept: Stacks, taken: Stacks, statistics: Stacks) -> Any:
        kept, bad = refresh(s, now, kept, statistics, taken) if last else (kept, {})
        return kept, (bad,)

    def sentence(share: Share, now: Now, kept: Stacks, blocks: Stacks, statistics: Stacks) -> Any:
        parts, bad = change(share, now, kept, blocks, statistics)
        kept, taken = _unzipped(parts)
        parts, more = use(share, now, kept, blocks)
        kept, u = _unzipped(parts)
        kept, late = close(share, now, kept, taken, statistics)
        return _zipped(kept, u), (*bad, *more, *late)

    mine, own = (placement.divided(s.split, x) for x in (blocks, statistics))
    if not placement.shared(s):
        parts, bad = placement.on_shares(s, sentence, now, kept, mine, own)
        kept, u = _unzipped(parts)
        return placement.place(s, kept), placement.collected(s, u), bad
    parts, bad = placement.on_shares(s, change, now, placement.spread(s, kept), mine, own)
    new, taken = _unzipped(parts)
    kept, u, more = placement.on_all(s, use, now, placement.held(s, kept, new), blocks)
    if last:
        new, late = placement.on_shares(s, close, now, placement.spread(s, kept), taken, own)
        kept, more = placement.held(s, kept, new), more + late
    return placement.place(s, kept), u, bad + more


def _zipped(a: Stacks, b: Stacks) -> Stacks:
    return {key: (a[key], b[key]) for key in a}


def _unzipped(pairs: Stacks) -> tuple[Stacks, Stacks]:
    return {key: x[0] for key, x in pairs.items()}, {key: x[1] for key, x in pairs.items()}


def _whole(s: Static, arrays: Any) -> Any:
    """Where blocks are divided over devices, leaves are made whole before they are cut.

    A partitioner left to itself sends pieces of them about at every reshape.
    """
    return arrays if s.split is None else s.split.whole(arrays)


def _usable(s: Static, blocks: Stacks, leaves: list[jax.Array]) -> jax.Array:
    """Whether the squared norm of the gradient is finite: else the whole step is skipped.

    One reduction per bucket, one over all small leaves without blocks (a kernel for each would be
    long to compile), one for each large one (which must not be made whole on every device).
    """
    sums = [jnp.sum(per_block(x * x, jnp.sum)) for x in blocks.values()]
    rest = [leaves[i].astype(factor_dtype_of(leaves[i].dtype)) for i, *_ in s.plan.uncovered]
    sums += [jnp.sum(x * x) for x in rest if x.size > SMALL]
    rest = [x for x in rest if x.size <= SMALL]
    if rest:
        dtype = max((x.dtype for x in rest), key=lambda d: jnp.finfo(d).bits)
        flat = jnp.concatenate([trees.replicate(x).reshape(-1).astype(dtype) for x in rest])
        sums.append(jnp.sum(flat * flat))
    wide = max((x.dtype for x in sums), key=lambda d: jnp.finfo(d).bits)
    finite = jnp.isfinite(jnp.sum(jnp.stack([x.astype(wide) for x in sums])))
    # XLA does not see through a conditional: one number, not a computation in every kernel
    return jax.lax.cond(finite, lambda: jnp.ones((), bool), lambda: jnp.zeros((), bool))


def _statistics(s: Static, blocks: Stacks, extra: dict[str, Any]) -> tuple[Stacks, Any]:
    """Statistics by bucket (empty: none), and whether they are those of this step."""
    found = s.options.source(s.plan, blocks, extra)
    statistics, fresh = found if isinstance(found, tuple) else (found, True)
    return (statistics or {}), fresh
