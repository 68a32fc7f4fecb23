"""The engine: a block method becomes an optax transformation of a whole tree of parameters."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import grafting, stacks, step, trees
from kradagrad_jax.engine.grafting import Graft
from kradagrad_jax.engine.layout import Layout, Plan, factor_dtype_of
from kradagrad_jax.engine.options import (
    BlockState,
    Options,
    Source,
    grafts_of,
    plan_of,
    runs_fallback,
    uncovered_only,
)
from kradagrad_jax.engine.sharding import Sharding, resolve
from kradagrad_jax.engine.timing import Interval, Timing
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
    graft: Graft | str | None = None,
    fallback: Graft | str | optax.GradientTransformation = "adam",
    beta1: Any = None,
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
      graft: where the length of the step comes from.
      fallback: what parameters without blocks do: a graft kind (its direction is the step),
        ``"identity"``, or a GradientTransformation that is run on them alone.
      beta1: decay of the average of gradients that is preconditioned in place of the gradient
        (bias-corrected); None: no average, no memory for it.
      factor_dtype: dtype of the factors; None: that of the parameter, float32 at least.
      mu_dtype: dtype of the average; None: that of the parameter, float32 at least.
      source: ``(plan, gradient stacks, extra args) -> statistics by bucket``, or a pair of them and
        a (traced) bool: where statistics other than the gradient come from. None in place of the
        statistics, or False, stands for "none at this step".
      sharding: how factors and the work on them are spread over the devices of a mesh, see
        :class:`Sharding`; None: no device knows of others.

    Returns:
      A ``GradientTransformationExtraArgs`` with state :class:`BlockState`. Its updates have the
      dtype of the gradients and positive sign.

    Raises:
      ValueError: while tracing, for complex or integer parameters, for a state of other
        parameters, for staggering without a fixed interval, and for a sharding without its mesh.
    """
    timing = timing or Timing()
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
    if fallback != "identity" and isinstance(fallback, str):
        fallback = Graft(fallback)  # type: ignore[arg-type]
    options = Options(
        method, layout or Layout(), timing, refresh_every, statistics_every,
        grafting.as_graft(graft), fallback, beta1,
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


def _init(o: Options, params: Any) -> BlockState:
    leaves, treedef = trees.flatten(params)
    real = [i for i, x in enumerate(leaves) if not trees.is_masked(x)]
    # four arrays, not one four times: donated states must not share buffers
    counts = [jnp.zeros((), jnp.int32) for _ in range(4)]
    state = BlockState(*counts, mu=None, nu=None, factors={}, fallback=None)  # type: ignore
    if not jax.tree.leaves(params):  # optax's placeholder stands for "like the parameters"
        slot = params
        return state._replace(
            mu=None if o.beta1 is None else slot,
            nu=slot,
            factors=slot,
            fallback=o.fallback.init(params) if runs_fallback(o) else None,
        )
    plan = plan_of(params, o.layout, o.factor_dtype)
    grafts = grafts_of(o, plan)
    owned = [grafts[j] is not None or not runs_fallback(o) for j in range(len(real))]

    def tree_of(dtype: Any, wanted: list[bool]) -> Any:
        out: list[Any] = [optax.MaskedNode()] * len(leaves)
        for j, i in enumerate(real):
            if wanted[j] and 0 not in leaves[i].shape:
                own = dtype or factor_dtype_of(leaves[i].dtype)
                out[i] = jnp.zeros_like(leaves[i], dtype=own)
        return trees.unflatten(treedef, out)

    squares = [g is not None and g.adaptive for g in (grafts[j] for j in range(len(real)))]
    return state._replace(
        mu=None if o.beta1 is None else tree_of(o.mu_dtype, owned),
        nu=tree_of(None, squares) if any(squares) else None,
        factors=stacks.init(o.method, plan, resolve(o.sharding)),
        fallback=o.fallback.init(uncovered_only(params, plan)) if runs_fallback(o) else None,
    )
