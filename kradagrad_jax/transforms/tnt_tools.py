"""Around TNT: the warm start of its statistics, and the learning rate that it falls back to."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import BlockState, Graft, Timing
from kradagrad_jax.engine.fold import fold
from kradagrad_jax.engine.static import Options, plan_of, static_of
from kradagrad_jax.engine.timing import Now
from kradagrad_jax.factors.modes import axis_groups
from kradagrad_jax.factors.tnt import TntFactor, tnt_method
from kradagrad_jax.transforms import sampled
from kradagrad_jax.transforms.arguments import bound, declaration_of
from kradagrad_jax.transforms.tnt import scale_by_tnt, tnt_options


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
    c = _chosen("tnt_warm_start", options)
    method = tnt_method(tnt_options(c)._replace(averaging="mean"))
    layout = sampled.unmerged(c["layout"])
    rest = c["fallback"] or "identity"
    if isinstance(rest, str) and rest != "identity":
        rest = Graft(rest)  # type: ignore[arg-type]
    options_of_engine = Options(
        method, layout, Timing(), 1, 1, "first", Graft(), rest, c["beta1"], "sum",
        c.get("factor_dtype"), None, sampled.source("tnt", c["fisher"]), None,
    )  # fmt: skip
    zero, yes = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    now = Now(zero, zero + 1, yes, True, 1, 1)
    found = []

    def warmed(x: Any) -> Any:
        if not _is_tnt(x):
            return x
        found.append(x)
        s = static_of(options_of_engine, params, x)
        new = sampled.stacked(s.plan, samples)
        kept, _, bad = fold(s, now, x.kept(), new, new)
        undone = sum(jnp.sum(b, dtype=jnp.int32) for b in bad.values())
        return x.keeping(kept, rejected=x.rejected + undone)

    out = jax.tree.map(warmed, state, is_leaf=_is_tnt)
    if not found:
        raise ValueError("the optimizer state holds no TNT statistics")
    return out


def _chosen(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What :func:`scale_by_tnt` makes of these arguments."""
    declared = declaration_of(scale_by_tnt)
    return declared.choose(bound(name, declared.signature(), (), options))


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
    c = _chosen("tnt_rates", options)
    out = {}
    plan = plan_of(params, sampled.unmerged(c["layout"]))
    for group in plan.covered:
        modes = len(axis_groups(c["grouping"], group.merged))
        power = modes if c["damping_rule"] == "per_mode" else 1
        rate = float(f"{learning_rate / c['damping'] ** power:.12g}")
        out |= dict.fromkeys(group.paths, rate)
    return out
