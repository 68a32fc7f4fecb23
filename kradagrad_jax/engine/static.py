"""All that one update knows before it sees a number: plan, methods, options, placement."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.graft import Graft
from kradagrad_jax.engine.layout import Layout, factor_dtype_of
from kradagrad_jax.engine.plan import Bucket, Plan, make_plan, owners
from kradagrad_jax.engine.sharding import Sharding, Split, resolve
from kradagrad_jax.engine.state import BlockState, check_meaning
from kradagrad_jax.engine.timing import Interval, Timing
from kradagrad_jax.factors.method import BlockMethod

Statistics = dict[str, Any] | None
Source = Callable[
    [Plan, dict[str, jax.Array], dict[str, Any]],
    Statistics | tuple[Statistics, jax.Array | bool],
]


class Options(NamedTuple):
    """Arguments of :func:`scale_by_blocks` after checks; see there."""

    method: BlockMethod | Mapping[str, BlockMethod]
    layout: Layout
    timing: Timing
    refresh_every: Interval
    statistics_every: Interval
    refresh: str
    graft: Graft
    fallback: Any
    beta1: Any
    average: str
    factor_dtype: Any
    mu_dtype: Any
    source: Source
    sharding: Sharding | None

    @property
    def runs_fallback(self) -> bool:
        """Whether leaves without blocks are left to a transformation of the user's."""
        return self.fallback != "identity" and not isinstance(self.fallback, Graft)

    @property
    def leaf_graft(self) -> Graft | None:
        """Whose direction leaves without blocks take; None: their own, or the user's."""
        return self.fallback if isinstance(self.fallback, Graft) else None


class Static(NamedTuple):
    """One update, statically."""

    options: Options
    plan: Plan
    split: Split | None

    def method(self, bucket: Bucket) -> BlockMethod:
        """The method that treats a bucket."""
        own = self.options.method
        return own if isinstance(own, BlockMethod) else own[bucket.group]

    def new_factor(self, bucket: Bucket) -> Any:
        """The factor of one block before its first statistic."""
        method, shape = self.method(bucket), bucket.shape
        extra = (bucket.factored,) if method.partial else ()
        return method.init(shape, bucket.dtype, *extra)

    def length(self, bucket: Bucket) -> int:
        """Number of rows of the stacks of a bucket: its blocks, and what fills them up."""
        return bucket.size if self.split is None else self.split.padded(bucket.size)

    def names(self) -> list[str]:
        """Fingerprints of the methods in use, and of what else is kept in an unusual form."""
        o, plan = self.options, self.plan
        leaves = o.leaf_graft if plan.uncovered else None
        kept = ("graft", o.graft.squares), ("fallback", leaves.squares if leaves else "")
        sums = ["sum of gradients"] if o.beta1 is not None and o.average == "sum" else []
        own = [*sums, *(f"{name}: {form}" for name, form in kept if form)]
        return sorted({", ".join([self.method(b).name, *own]) for b in plan.buckets})

    def owners(self) -> tuple[dict[str, np.ndarray], int]:
        """Per row of every stack its owner; what fills stacks up belongs to one more."""
        own, number = owners(self.plan)
        return {
            b.key: np.pad(own[b.key], (0, self.length(b) - b.size), constant_values=number)
            for b in self.plan.buckets
        }, number + 1


def plan_of(tree: Any, layout: Layout, factor_dtype: Any = None, params: Any = None) -> Plan:
    """The static plan of a tree of parameters, gradients or ShapeDtypeStructs.

    The dtypes of factors are those of ``params``, where these are given and fit: gradients may have
    others.
    """
    leaves, paths = trees.flatten(tree)[0], trees.paths_of(tree)
    own = leaves if params is None else trees.flatten(params)[0]
    own = own if len(own) == len(leaves) else leaves
    typed = [y if hasattr(y, "dtype") else x for x, y in zip(leaves, own, strict=True)]
    keep = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    trees.check_dtypes([paths[i] for i in keep], [leaves[i] for i in keep])
    names = trees.names_of(tree)
    return make_plan(
        tuple(paths[i] for i in keep),
        tuple(tuple(leaves[i].shape) for i in keep),
        tuple(factor_dtype_of(typed[i].dtype, factor_dtype) for i in keep),
        tuple(names[i] for i in keep),
        layout,
    )


def static_of(o: Options, tree: Any, state: Any = None, params: Any = None) -> Static:
    """Plans an update of ``tree``, and checks that the state is its own.

    Raises:
      ValueError: the state is of another method, of other parameters or for other devices.
    """
    plan = plan_of(tree, o.layout, o.factor_dtype, params)
    s = Static(o, plan, resolve(o.sharding))
    if state is None:
        return s
    check_meaning(s.names(), state)
    s = s._replace(plan=_as_stored(plan, state.factors))
    _check_stacks(s, state)
    return s


def _as_stored(plan: Plan, factors: Any) -> Plan:
    """The plan with the dtypes of the state: gradients may be wider than parameters."""

    def stored(bucket: Bucket) -> Bucket:
        leaves = jax.tree.leaves(factors.get(bucket.key)) if isinstance(factors, dict) else []
        dtypes = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        dtypes = [d for d in dtypes if jnp.finfo(d).bits >= 32]  # half-precision storage: no hint
        return bucket._replace(dtype=dtypes[0]) if dtypes else bucket

    return plan._replace(buckets=tuple(stored(b) for b in plan.buckets))


def _check_stacks(s: Static, state: BlockState) -> None:
    """Raises ValueError where the state's stacks are not those of the given parameters."""
    for bucket in s.plan.buckets:
        size = s.length(bucket)
        want = jax.tree.leaves(jax.eval_shape(lambda b=bucket: s.new_factor(b)))
        have = jax.tree.leaves(state.factors.get(bucket.key))
        same = [x.shape for x in have] == [(size, *x.shape) for x in want]
        if not same or state.clock[bucket.key].statistics.shape != (size,):
            own = [s.plan.covered[slot.leaves] for slot in bucket.slots] or s.plan.covered
            paths = sorted({p for entry in own for p in entry.paths})
            raise ValueError(
                f"the optimizer state has no stack of {size} blocks of shape {bucket.key} for "
                f"parameters {', '.join(repr(n) for n in paths[:4])}: it was initialised with "
                "other parameters, another layout or for another number of devices; call init "
                "again with these parameters (or see fit_state)"
            )
    unknown = sorted(set(state.factors) - {b.key for b in s.plan.buckets})
    if unknown:
        raise ValueError(
            f"the optimizer state has blocks of shape {unknown[0]}, the gradients have none: it "
            "was initialised with other parameters or another layout; call init again"
        )


def uncovered_only(tree: Any, plan: Plan) -> Any:
    """The tree with covered parameters masked, for the user's fallback transformation."""
    leaves, treedef = trees.flatten(tree)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    for group in plan.covered:
        for index in group.indices:
            leaves[real[index]] = optax.MaskedNode()
    return trees.unflatten(treedef, leaves)
