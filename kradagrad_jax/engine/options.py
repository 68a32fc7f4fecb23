"""State and checked arguments of the engine, and what follows from them for each parameter."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.grafting import Graft
from kradagrad_jax.engine.layout import Layout, Plan, factor_dtype_of, make_plan
from kradagrad_jax.engine.sharding import Sharding
from kradagrad_jax.engine.timing import Interval, Timing
from kradagrad_jax.factors.method import BlockMethod

Statistics = dict[str, Any] | None
Source = Callable[
    [Plan, dict[str, jax.Array], dict[str, Any]],
    Statistics | tuple[Statistics, jax.Array | bool],
]


class BlockState(NamedTuple):
    """State of every transformation that the engine builds.

    Attributes:
      count: number of updates, int32.
      statistics_count: number of statistics folded in, int32.
      skipped: number of updates whose gradient was not finite (no effect but on counts), int32.
      rejected: number of block updates or refreshes undone because they were not finite, and of
        directions not taken for the same reason (the block then goes as without preconditioner),
        int32.
      mu: average of the gradient, shaped like the parameters; None without ``beta1``.
      nu: accumulator of squares for grafting and fallback (``MaskedNode`` where not needed); None
        where no parameter needs one.
      factors: ``{block shape: factor stacked over the blocks of that shape}``.
      fallback: state of the user's own fallback transformation, or None.
    """

    count: jax.Array
    statistics_count: jax.Array
    skipped: jax.Array
    rejected: jax.Array
    mu: Any
    nu: Any
    factors: Any
    fallback: Any


class Options(NamedTuple):
    """Arguments of :func:`scale_by_blocks` after checks; see there."""

    method: BlockMethod | Mapping[str, BlockMethod]
    layout: Layout
    timing: Timing
    refresh_every: Interval
    statistics_every: Interval
    graft: Graft
    fallback: Any
    beta1: Any
    factor_dtype: Any
    mu_dtype: Any
    source: Source
    sharding: Sharding | None


def plan_of(tree: Any, layout: Layout, factor_dtype: Any = None) -> Plan:
    """The static plan of a tree of parameters, gradients or ShapeDtypeStructs."""
    leaves, paths = trees.flatten(tree)[0], trees.paths_of(tree)
    keep = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    trees.check_dtypes([paths[i] for i in keep], [leaves[i] for i in keep])
    return make_plan(
        tuple(paths[i] for i in keep),
        tuple(tuple(leaves[i].shape) for i in keep),
        tuple(factor_dtype_of(leaves[i].dtype, factor_dtype) for i in keep),
        layout,
    )


def grafts_of(o: Options, plan: Plan) -> dict[int, Graft | None]:
    """The graft that applies to each leaf; None: no direction of ours (identity, own fallback)."""
    out: dict[int, Graft | None] = {leaf.index: o.graft for leaf in plan.covered}
    own = o.fallback if isinstance(o.fallback, Graft) else None
    for index, _, shape, _ in plan.uncovered:
        out[index] = own if 0 not in shape else None
    return out


def runs_fallback(o: Options) -> bool:
    return o.fallback != "identity" and not isinstance(o.fallback, Graft)


def uncovered_only(tree: Any, plan: Plan) -> Any:
    """The tree with covered parameters masked, for the user's fallback transformation."""
    leaves, treedef = trees.flatten(tree)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    for leaf in plan.covered:
        leaves[real[leaf.index]] = optax.MaskedNode()
    return trees.unflatten(treedef, leaves)
