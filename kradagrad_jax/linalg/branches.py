"""Work that some of a stack of matrices need now and then."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr


def when(pred: jax.Array, function: Callable[..., Any], old: Any, *operands: Any) -> Any:
    """Return `function(old, *operands)` where `pred`, else `old`.

    As `lax.cond`, but the work is also saved in a stack (`vmap` over `pred`) none of whose members
    needs it: `cond` would become a selection there, with the work done at every call.

    Args:
      pred: bool scalar.
      function: from trees of arrays to a tree like `old`; may close over traced arrays.
      old: tree of arrays.
      operands: further trees of arrays.

    Returns:
      A tree like `old`. The derivative, in both modes, is that of a selection.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(old, *operands)
    leaves = jax.tree.leaves((old, *operands))
    # what the function closes over becomes an argument: derivatives see all of them
    run = partial(eval_jaxpr, closed.jaxpr)
    kept = jax.tree.leaves(old)
    if jax.tree.structure(shape) != jax.tree.structure(old):
        raise TypeError(f"the branch gives {shape}, unlike the old value")
    out = _when(run, jnp.asarray(pred), kept, closed.consts, leaves)
    return jax.tree.unflatten(jax.tree.structure(old), out)


def _selected(run: Callable[..., Any], pred: jax.Array, old: Any, consts: Any, leaves: Any) -> Any:
    new = run(consts, *leaves)
    return [jnp.where(pred, n.astype(o.dtype), o) for n, o in zip(new, old, strict=True)]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _when(run: Callable[..., Any], pred: jax.Array, old: Any, consts: Any, leaves: Any) -> Any:
    # a loop of at most one round: its condition is reduced over a stack
    def once(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        # tied to the loop by the barrier: work on what does not change in it would be hoisted out
        pending, kept, *given = jax.lax.optimization_barrier((*carry, consts, leaves))
        return pending & False, _selected(run, pending, kept, *given)

    return jax.lax.while_loop(lambda carry: carry[0], once, (pred, old))[1]


@_when.defjvp
def _when_jvp(run: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    pred, *values = primals
    out = _when(run, pred, *values)
    selected = partial(_selected, run, pred)
    return out, jax.jvp(selected, tuple(values), tuple(tangents[1:]))[1]
