"""The engine: a block method becomes an optax transformation of a whole tree of parameters."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import placement, report, rest, step, trees
from kradagrad_jax.engine import state as state_lib
from kradagrad_jax.engine.graft import Graft, as_graft
from kradagrad_jax.engine.layout import Layout, factor_dtype_of
from kradagrad_jax.engine.plan import Plan
from kradagrad_jax.engine.sharding import Sharding
from kradagrad_jax.engine.state import BlockState
from kradagrad_jax.engine.static import Options, Source, static_of, uncovered_only
from kradagrad_jax.engine.timing import Interval, Timing
from kradagrad_jax.engine.undeclared import undeclared_stacks
from kradagrad_jax.factors.method import BlockMethod


def gradient_statistics(
    plan: Plan, gradients: dict[str, jax.Array], extra: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The statistic of a gradient-only method: the gradient block itself."""
    del plan, extra
    return gradients, True


def scale_by_blocks(
    method: BlockMethod | Mapping[str, BlockMethod],
    *,
    layout: Layout | None = None,
    timing: Timing | None = None,
    refresh_every: Interval = 10,
    statistics_every: Interval = 1,
    refresh: str = "first",
    graft: Graft | str | None = None,
    fallback: Graft | str | optax.GradientTransformation = "adam",
    beta1: Any = None,
    average: str = "mean",
    factor_dtype: Any = None,
    mu_dtype: Any = None,
    source: Source = gradient_statistics,
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds an optax transformation from a method that knows only one block.

    Args:
      method: pure functions on one block; or several, by name, with ``Layout(group=...)`` that says
        which one treats a parameter.
      layout: how parameters are cut into blocks.
      timing: start, ramp, phases, staggering.
      refresh_every: steps between refreshes: an int, a traced int, or a function of the count.
      statistics_every: steps between statistics, likewise.
      refresh: ``"first"``: fold, refresh, correct, apply. ``"last"``: fold, apply, refresh,
        correct: the direction never waits for a refresh, and is that of the one before.
      graft: where the length of the step comes from.
      fallback: what parameters without blocks do: a graft kind (its direction is the step),
        ``"identity"``, or a GradientTransformation that is run on them alone.
      beta1: decay of the average of gradients that is preconditioned in place of the gradient;
        None: no average, no memory for it.
      average: ``"mean"``: it is bias-corrected; ``"sum"``: ``mu <- beta1 mu + g``, a heavy ball.
      factor_dtype: dtype of the factors; None: that of the parameter, float32 at least.
      mu_dtype: dtype of the average; None: that of the factors.
      source: ``(plan, gradient stacks, extra args) -> statistics by bucket``, or a pair of them and
        a (traced) bool: where statistics other than the gradient come from. None in place of the
        statistics, or False, stands for "none at this step".
      sharding: how factors and the work on them are spread over the devices of a mesh, see
        :class:`Sharding`; None: no device knows of others.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`BlockState`. Its updates have the
      dtype of the gradients and positive sign.

    Raises:
      ValueError: an unknown choice; while tracing, for complex or integer parameters, for a state
        of other parameters or of another method, for staggering without a fixed interval, and for
        a sharding without its mesh.
    """
    timing = timing or Timing()
    _check(factor_dtype, timing, refresh_every, refresh, average)
    if fallback != "identity" and isinstance(fallback, str):
        fallback = Graft(fallback)  # type: ignore[arg-type]
    options = Options(
        method, _layout_for(method, layout or Layout()), timing, refresh_every, statistics_every,
        refresh, as_graft(graft), fallback, beta1, average,
        None if factor_dtype is None else jnp.dtype(factor_dtype),
        None if mu_dtype is None else jnp.dtype(mu_dtype), source, sharding,
    )  # fmt: skip

    def init(params: optax.Params) -> BlockState:
        return _init(options, params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return step.update(options, updates, cast(BlockState, state), params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _layout_for(method: Any, layout: Layout) -> Layout:
    """The layout without what a method cannot do that gives every mode a factor.

    Raises:
      ValueError: it asks for modes without one.
    """
    own = [method] if isinstance(method, BlockMethod) else list(method.values())
    if all(m.partial for m in own):
        return layout
    if layout.modes is not None:
        names = sorted({m.name for m in own if not m.partial})
        raise ValueError(
            f"Layout.modes leaves modes without a factor, and {', '.join(names)} has one for every "
            "mode: leave it out, or give the method partial=True and an init that takes `factored`"
        )
    return dataclasses.replace(layout, max_dim=None, state_limit=None)


def _check(
    factor_dtype: Any, timing: Timing, refresh_every: Any, refresh: str, average: str
) -> None:
    if factor_dtype is not None and factor_dtype_of(factor_dtype) != jnp.dtype(factor_dtype):
        raise ValueError(
            f"factor_dtype must be float32 or float64, got {jnp.dtype(factor_dtype).name}: "
            "factorizations need it; parameters and gradients may be lower"
        )
    if timing.stagger and not isinstance(refresh_every, int):
        raise ValueError(
            "Timing(stagger=True) needs a fixed integer refresh_every; under "
            "optax.inject_hyperparams name it in static_args"
        )
    for name, value, allowed in (
        ("refresh", refresh, ("first", "last")),
        ("average", average, ("mean", "sum")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _init(o: Options, params: Any) -> BlockState:
    if not jax.tree.leaves(params):  # optax's placeholder, or no parameters at all
        return _placeholder(o)
    s = static_of(o, params)
    report.record(s, params)
    _warn_of_stacks(o, params)
    kept = {b.key: placement.new_kept(s, b, s.length(b)) for b in s.plan.buckets}
    empty = {} if o.beta1 is not None else None
    state = BlockState(
        *state_lib.counts(3),
        meaning={name: jnp.full((), state_lib.FORMAT, jnp.int32) for name in s.names()},
        clock={}, mu=empty, nu={} if o.graft.adaptive else None, factors={},
        rest=rest.init(o, s, params),
        fallback=o.fallback.init(uncovered_only(params, s.plan)) if o.runs_fallback else None,
    )  # fmt: skip
    return state.keeping(placement.place(s, kept))


def _placeholder(o: Options) -> BlockState:
    squares = o.leaf_graft is not None and o.leaf_graft.adaptive
    average = o.beta1 is not None
    return state_lib.placeholder(
        mu=average,
        nu=o.graft.adaptive,
        first=average and not o.runs_fallback,
        second=squares,
        fallback=o.runs_fallback,
    )


def _warn_of_stacks(o: Options, params: Any) -> None:
    """Says once that a tree looks scanned and the layout does not know."""
    if o.layout.joined:
        return
    leaves = trees.flatten(params)[0]
    keep = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    paths, names = trees.paths_of(params), trees.names_of(params)
    shapes = [tuple(leaves[i].shape) for i in keep]
    parts = [paths[i] for i in keep], shapes, [names[i] for i in keep]
    for prefix, axis, size in undeclared_stacks(*parts, o.layout):
        warnings.warn(
            f"all parameters under '{prefix}' have {size} entries along axis {axis}, as stacked "
            "(scanned) layers have, and are preconditioned as ONE layer. If they are layers, say "
            f"so: Layout(stacked={{'^{prefix}': {axis}}}); if they are not: "
            f"Layout(stacked={{'^{prefix}': None}})",
            stacklevel=4,
        )
