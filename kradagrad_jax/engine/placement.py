"""Runs the work on the blocks where they are: on this device, or on every device's share.

Every device of a mesh holds an equal share of the blocks of each bucket and works on these alone;
what all devices need afterwards is collected by one all-gather. All communication is JAX's own:
`jax.shard_map` and changes of sharding.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kradagrad_jax.engine.plan import Bucket
from kradagrad_jax.engine.sharding import Split
from kradagrad_jax.engine.state import Clock, Kept, counts
from kradagrad_jax.engine.static import Static
from kradagrad_jax.engine.timing import Now
from kradagrad_jax.factors.method import Rows, Step

Trees = dict[str, Any]  # by bucket


class Share(NamedTuple):
    """The blocks that a device works on, as seen from inside.

    Attributes:
      owners: per bucket the owner of each of its rows.
      number: of owners.
      single: buckets of one block, which every device has.
      axes: of the mesh, over which all others are divided; empty: there is one device.
    """

    owners: dict[str, jax.Array]
    number: int
    single: frozenset[str]
    axes: tuple[str, ...]

    def number_of(self, *flags: dict[str, jax.Array]) -> jax.Array:
        """How many flags the blocks of all devices have, int32."""
        per_block: dict[str, Any] = {}
        for key, x in itertools.chain.from_iterable(f.items() for f in flags):
            per_block[key] = per_block.get(key, 0) + x.astype(jnp.int32)
        counts = {key: jnp.sum(x, dtype=jnp.int32) for key, x in per_block.items()}
        return self.total(counts, jnp.zeros((), jnp.int32))

    def total(self, parts: dict[str, jax.Array], zero: jax.Array) -> jax.Array:
        """Sum of what the buckets of all devices contribute."""
        same = sum((x for key, x in parts.items() if key in self.single), start=zero)
        own = sum((x for key, x in parts.items() if key not in self.single), start=zero)
        return same + (jax.lax.psum(own, self.axes) if self.axes else own)

    def by_owner(self, values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Per row of each bucket the sum of the values ``(size, k)`` of all rows of its owner."""
        if not values:
            return {}
        wide = max((x.dtype for x in values.values()), key=lambda d: jnp.finfo(d).bits)
        zero = jnp.zeros((self.number, next(iter(values.values())).shape[1]), wide)
        sums = {key: zero.at[self.owners[key]].add(x.astype(wide)) for key, x in values.items()}
        joint = self.total(sums, zero)
        return {key: joint[self.owners[key]] for key in values}


def on_shares(
    s: Static, work: Callable[..., tuple[Any, tuple[Any, ...]]], now: Now, *stacks: Trees
) -> tuple[Any, jax.Array]:
    """Runs ``work`` on every device's share of the stacks.

    Args:
      s: the static part of the update.
      work: ``(share, now, *stacks) -> (trees by bucket, flags)``: dicts of bools by block.
      now: scalars, the same on all devices.
      *stacks: by bucket, filled up and divided.

    Returns:
      The trees, and the number of flags of all blocks.

    Raises:
      ValueError: ``work`` uses traced arrays on Explicit axes other than its arguments.
    """
    owners, number = s.owners()
    rows = {key: jnp.asarray(x) for key, x in owners.items()}
    single = frozenset(b.key for b in s.plan.buckets if b.size == 1)
    if s.split is None:
        share = Share(rows, number, single, ())
        out, flags = work(share, now, *stacks)
        return out, share.number_of(*flags)
    split = s.split
    traced = {k: v for k, v in now._asdict().items() if isinstance(v, jax.Array)}
    specs = {key: PartitionSpec() if key in single else split.parts for key in owners}
    rows = {key: split.place(x, specs[key]) for key, x in rows.items()}

    def run(traced: dict[str, jax.Array], rows: Trees, *stacks: Trees) -> tuple[Any, jax.Array]:
        share = Share(rows, number, single, split.axes)
        out, flags = work(share, now._replace(**traced), *stacks)
        return out, share.number_of(*flags)

    given = tuple({key: specs[key] for key in tree} for tree in (rows, *stacks))
    try:
        return jax.shard_map(
            run,
            mesh=split.mesh,
            in_specs=(PartitionSpec(), *given),
            out_specs=(specs, PartitionSpec()),
            check_vma=False,
        )(traced, rows, *stacks)
    except NotImplementedError as error:
        if "Explicit" not in str(error):
            raise
        raise ValueError(
            "Sharding on a mesh with Explicit axes does not go with traced hyperparameters (as "
            "optax.inject_hyperparams has them): name them in its static_args, use schedules of "
            "the step, or a mesh with Auto axes"
        ) from error


def divided(split: Split | None, stacks: Trees) -> Trees:
    """Stacks of all blocks, filled up and divided; single blocks stay on every device."""
    if split is None:
        return stacks

    def one(x: jax.Array, whole_first: bool) -> jax.Array:
        size = x.shape[0]
        if size == 1:
            return x
        x = _filled(x, split.padded(size))
        return split.place(split.whole(x) if whole_first else x, split.parts)

    out = {}
    for key, tree in stacks.items():
        # Left to itself the partitioner divides what leads to the stack, at a cost. But the rows
        # of a divided batch are never made whole: every device gets those of its own layers.
        rows = isinstance(tree, Rows)
        out[key] = jax.tree.map(lambda x, w=not rows: one(x, w), tree)
    return out


def collected(s: Static, stacks: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Divided stacks, whole on every device, without what filled them up."""
    if s.split is None:
        return stacks
    several = {b.key: stacks[b.key] for b in s.plan.buckets if b.size > 1}
    out = stacks | (_gathered(s.split, several) if several else {})
    return {b.key: out[b.key][: b.size] for b in s.plan.buckets}


def _gathered(split: Split, tree: Any) -> Any:
    """Divided stacks, whole on every device, by ONE all-gather per dtype."""
    leaves, treedef = jax.tree.flatten(tree)
    out: list[Any] = list(leaves)
    for dtype in sorted({x.dtype for x in leaves}, key=str):
        own = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        pack = jax.shard_map(
            lambda *parts: jnp.concatenate([x.reshape(-1) for x in parts]),
            mesh=split.mesh,
            in_specs=split.parts,
            out_specs=split.parts,
            check_vma=False,
        )
        packed = split.whole(pack(*(leaves[i] for i in own)))
        packed = packed.reshape(split.devices, -1)
        start = 0
        for i in own:
            width = leaves[i].size // split.devices
            x = packed[:, start : start + width].reshape(leaves[i].shape)
            out[i] = split.whole(x)
            start += width
    return jax.tree.unflatten(treedef, out)


def place(s: Static, kept: dict[str, Kept]) -> dict[str, Kept]:
    """What is kept of the blocks, where it belongs."""
    split, out = s.split, dict(kept)
    if split is None:
        return kept
    for bucket in s.plan.buckets:
        leaves, treedef = jax.tree.flatten(kept[bucket.key])
        specs = [PartitionSpec() if w else split.parts for w in _whole(s, bucket)]
        placed = [split.place(x, p) for x, p in zip(leaves, specs, strict=True)]
        out[bucket.key] = treedef.unflatten(placed)
    return out


def shared(s: Static) -> bool:
    """Whether every device holds the preconditioners and applies them by itself."""
    return s.split is not None and s.split.gather == "preconditioners"


def spread(s: Static, kept: dict[str, Kept]) -> dict[str, Kept]:
    """What is kept, divided over the devices, for work on it alone."""
    assert s.split is not None
    split = s.split
    return {
        b.key: split.place(kept[b.key], split.parts) if b.size > 1 else kept[b.key]
        for b in s.plan.buckets
    }


def held(s: Static, old: dict[str, Kept], new: dict[str, Kept]) -> dict[str, Kept]:
    """What every device holds is collected, in one go, at the steps at which any of it changed.

    Args:
      s: the static part of the update.
      old: what was kept, where it belongs.
      new: the same after a change of clocks and factors, divided.

    Returns:
      ``new``, where it belongs.
    """
    assert s.split is not None
    split = s.split
    before: dict[tuple[str, int], jax.Array] = {}
    parts, out = dict(before), {b.key: jax.tree.flatten(new[b.key]) for b in s.plan.buckets}
    for b in s.plan.buckets:
        leaves = out[b.key][0]
        moments = [x is not None for x in (new[b.key].mu, new[b.key].nu)]
        first = len(leaves) - sum(moments)  # averages and squares are nobody's to change here
        leaves[first:] = jax.tree.leaves(old[b.key])[first:]
        own = [i for i, w in enumerate(_whole(s, b)[:first]) if w and b.size > 1]
        parts |= {(b.key, i): leaves[i] for i in own}
        before |= {(b.key, i): jax.tree.leaves(old[b.key])[i] for i in own}
    if parts:
        moved = [jnp.any(x != split.place(before[i], split.parts)) for i, x in parts.items()]
        now = jax.lax.cond(
            jnp.any(jnp.stack(moved)), lambda: list(_gathered(split, parts).values()),
            lambda: [split.whole(x) for x in before.values()],
        )  # fmt: skip
        for (key, i), x in zip(parts, now, strict=True):
            out[key][0][i] = x
    return {key: treedef.unflatten(leaves) for key, (leaves, treedef) in out.items()}


def on_all(
    s: Static, use: Callable[..., Any], now: Now, kept: dict[str, Kept], blocks: Trees
) -> tuple[dict[str, Kept], Trees, jax.Array]:
    """Applies preconditioners to all blocks on every device.

    Args:
      s: the static part of the update.
      use: ``(share, now, kept, blocks) -> ({bucket: (kept, directions)}, flags)``.
      now: scalars.
      kept: what is kept, where it belongs.
      blocks: gradients of all blocks.

    Returns:
      What is kept, where it belongs; directions; the number of flags.
    """
    given = {}
    for b in s.plan.buckets:
        leaves, treedef = jax.tree.flatten(kept[b.key])
        blank = jax.tree.leaves(new_kept(s, b, 1))
        given[b.key] = treedef.unflatten(
            x[: b.size] if w else jnp.broadcast_to(y, (b.size, *y.shape[1:]))
            for x, y, w in zip(leaves, blank, _whole(s, b), strict=True)
        )
    owners, number = s.owners()
    rows = {b.key: jnp.asarray(owners[b.key][: b.size]) for b in s.plan.buckets}
    share = Share(rows, number, frozenset(rows), ())
    out, flags = use(share, now, given, blocks)
    kept = dict(kept)
    for b in s.plan.buckets:
        mu, nu = (_filled(x, s.length(b)) for x in (out[b.key][0].mu, out[b.key][0].nu))
        kept[b.key] = kept[b.key]._replace(mu=mu, nu=nu)
    return kept, {key: x[1] for key, x in out.items()}, share.number_of(*flags)


def _filled(x: Any, size: int) -> Any:
    """A stack filled up with zeros; None stays None."""
    if x is None:
        return None
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def new_kept(s: Static, bucket: Bucket, size: int) -> Kept:
    """What is kept of so many blocks of a bucket before the first step."""
    o = s.options
    one = s.new_factor(bucket)
    zeros = jnp.zeros((size, *bucket.shape), bucket.dtype)
    return Kept(
        # what fills a stack up has clocks that never start
        Clock(*(jnp.where(jnp.arange(size) < bucket.size, x, -1) for x in counts(2))),
        jax.tree.map(lambda x: jnp.tile(x[None], (size,) + (1,) * x.ndim), one),
        None if o.beta1 is None else zeros.astype(o.mu_dtype or bucket.dtype),
        zeros + 0 if o.graft.adaptive else None,
    )


def _whole(s: Static, bucket: Bucket) -> list[bool]:
    """Which arrays of what is kept of a bucket every device has for all blocks."""
    kept = jax.eval_shape(lambda: new_kept(s, bucket, 1))
    number = len(jax.tree.leaves(kept))
    if bucket.size == 1 or not shared(s):
        return [bucket.size == 1] * number
    factor = jax.eval_shape(lambda: s.new_factor(bucket))
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    gradient = jax.ShapeDtypeStruct(bucket.shape, bucket.dtype)
    method = s.method(bucket)
    step = Step(count, count, count, count)
    jaxpr = jax.make_jaxpr(method.precondition)(factor, gradient, step)
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    read |= {id(v) for v in jaxpr.jaxpr.outvars}
    own = [id(v) in read for v in jaxpr.jaxpr.invars]
    # a direction that vanishes is a fault only once there is a preconditioner: see apply
    clock = [own[-2] or method.refresh is None, own[-1] or method.refresh is not None]
    arrays = len(jax.tree.leaves(factor))
    return clock + own[:arrays] + [True] * (number - len(clock) - arrays)
