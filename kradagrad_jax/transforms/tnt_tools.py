"""Around TNT: the warm start of its statistics, and the learning rate that it falls back to."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import BlockState, stacks
from kradagrad_jax.engine.options import plan_of
from kradagrad_jax.factors.method import Step
from kradagrad_jax.factors.modes import axis_groups
from kradagrad_jax.factors.tnt import TntFactor, tnt_method
from kradagrad_jax.transforms import sampled
from kradagrad_jax.transforms.common import choose
from kradagrad_jax.transforms.tnt import PRESETS, tnt_options


def tnt_warm_start(state: Any, samples: Any, params: Any, **options: Any) -> Any:
    """Folds one batch of the pass before training into the statistics: their plain average.

    The paper goes once over the data at the initial parameters. The first update of a state that
    was warm-started takes no statistics.

    Args:
      state: any optimizer state that holds that of :func:`scale_by_tnt` (or its alias).
      samples: sampled gradients of the batch; ``Samples.from_gradients(grads)`` for TNT-EF.
      params: the parameters.
      **options: the arguments that :func:`scale_by_tnt` was given.

    Returns:
      The new state.

    Raises:
      ValueError: there is no TNT state of these parameters; ``spec`` is among the options.
    """
    if options.get("spec") is not None:
        raise ValueError("tnt_warm_start knows parameters, not layers (spec=)")
    preset = options.pop("preset", "recommended")
    c = choose(preset, PRESETS, options)
    method = tnt_method(tnt_options(c, None, None, False)._replace(averaging="mean"))
    layout = sampled.unmerged(c["layout"])
    plan = plan_of(sampled.scalars_to_vectors(params), layout, c.get("factor_dtype"))
    zero = jnp.zeros((), jnp.int32)
    step = Step(zero, zero, 1, jnp.zeros((), bool))
    found = []

    def fold(x: Any) -> Any:
        if not _is_tnt(x):
            return x
        found.append(x)
        stored = stacks.as_stored(plan, x.factors)
        stacks.check(method, stored, x.factors)
        new = sampled.stacked(stored, samples)
        factors, bad = stacks.accumulate(method, stored, x.factors, new, step)
        return x._replace(factors=factors, rejected=x.rejected + bad)

    out = jax.tree.map(fold, state, is_leaf=_is_tnt)
    if not found:
        raise ValueError("the optimizer state holds no TNT statistics")
    return out


def _is_tnt(x: Any) -> bool:
    if not isinstance(x, BlockState) or not isinstance(x.factors, dict):
        return False
    return any(isinstance(f, TntFactor) for f in x.factors.values())


def tnt_rates(params: Any, learning_rate: float, **options: Any) -> dict[str, float]:
    """Learning rate of SGD that each parameter falls back to as its sampled gradients vanish.

    Args:
      params: the parameters, for their shapes.
      learning_rate: of TNT.
      **options: the arguments of :func:`scale_by_tnt` (damping, its rule, grouping, preset).

    Returns:
      ``{path: lr * damping^-k}`` with k the number of modes. Well above the learning rate that SGD
      with the same momentum would stand (100, say), runs have diverged.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kradagrad_jax.transforms.tnt_tools import tnt_rates
      >>> tnt_rates({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, 1e-4, damping=0.1)
      {'b': 0.001, 'w': 0.01}
    """
    preset = options.pop("preset", "recommended")
    c = choose(preset, PRESETS, options)
    out = {}
    plan = plan_of(sampled.scalars_to_vectors(params), sampled.unmerged(c["layout"]))
    for leaf in plan.covered:
        modes = len(axis_groups(c["grouping"], leaf.merged))
        power = modes if c["damping_rule"] == "per_mode" else 1
        out[leaf.path] = float(f"{learning_rate / c['damping'] ** power:.12g}")
    return out
