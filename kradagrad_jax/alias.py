"""Complete optimizers: a ``scale_by_*`` transformation with momentum, decay and learning rate."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine.layers import LayerTransformation
from kradagrad_jax.transforms.arguments import Public, bound, declaration_of
from kradagrad_jax.transforms.ginger import scale_by_ginger
from kradagrad_jax.transforms.kfac import scale_by_kfac
from kradagrad_jax.transforms.kl_shampoo import scale_by_kl_shampoo, scale_by_kl_soap
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad, scale_by_kradagrad_star
from kradagrad_jax.transforms.lowrank import (
    scale_by_b_kfac,
    scale_by_bc_kfac,
    scale_by_br_kfac,
    scale_by_brc_kfac,
    scale_by_rs_kfac,
    scale_by_sre_kfac,
)
from kradagrad_jax.transforms.shampoo import scale_by_shampoo
from kradagrad_jax.transforms.singd import scale_by_ikfac, scale_by_ingd, scale_by_singd
from kradagrad_jax.transforms.sirfshampoo import scale_by_sirfshampoo
from kradagrad_jax.transforms.soap import scale_by_soap
from kradagrad_jax.transforms.tnt import scale_by_tnt

Mask = Any | Callable[[optax.Params], Any] | None
_OWN = {"momentum": None, "nesterov": False, "weight_decay": None, "weight_decay_mask": None}


def _complete(
    scale_by: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any,
    nesterov: bool,
    weight_decay: Any,
    weight_decay_mask: Mask,
    coupled: bool,
) -> optax.GradientTransformationExtraArgs:
    """The chain; parts that are statically off are left out (``params=None`` then works).

    Like ``scale_by`` by itself it gives zero, and keeps its momentum, where the gradient is not
    finite.
    """
    average = [] if momentum is None else [optax.trace(momentum, nesterov)]
    if average and isinstance(scale_by, LayerTransformation):
        # the fallback of layer methods (Adam) brings momentum of its own
        average = [optax.masked(average[0], scale_by.covered)]
    decay = []
    if weight_decay is not None and not (
        isinstance(weight_decay, (int, float)) and not weight_decay
    ):
        decay = [optax.add_decayed_weights(weight_decay, weight_decay_mask)]
    middle = decay + average if coupled else average + decay
    chain = optax.chain(scale_by, *middle, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(_held(chain) if middle else chain)


def _held(chain: Any) -> optax.GradientTransformationExtraArgs:
    """The chain, without the moves of its other parts where the first one skips a step."""

    run: Callable[..., tuple[Any, Any]] = chain.update

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        out, new = run(updates, state, params, **extra)
        moves = new[0].skipped == state[0].skipped

        def hold(now: jax.Array, before: jax.Array) -> jax.Array:
            floats = jnp.issubdtype(now.dtype, jnp.floating)  # counts run on, as the first part's
            return jnp.where(moves, now, before) if floats else now

        rest = jax.tree.map(hold, new[1:], tuple(state)[1:])
        return jax.tree.map(lambda u: jnp.where(moves, u, 0), out), (new[0], *rest)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _alias(scale_by: Public, coupled: bool = False) -> Public:
    """The complete optimizer of a transformation, with all of its arguments.

    Args:
      scale_by: the transformation; if it has an argument ``learning_rate``, it is passed on.
      coupled: weight decay goes through the momentum, as the method's authors have it.
    """
    name = scale_by.__name__.removeprefix("scale_by_")
    inherited = dict(inspect.signature(scale_by).parameters)
    wants_rate = inherited.pop("learning_rate", None) is not None
    parameter = inspect.Parameter
    own = [parameter(n, parameter.KEYWORD_ONLY, default=x) for n, x in _OWN.items()]
    signature = inspect.Signature(
        [parameter("learning_rate", parameter.POSITIONAL_OR_KEYWORD), *inherited.values(), *own],
        return_annotation=optax.GradientTransformationExtraArgs,
    )

    def optimizer(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        given = _OWN | bound(name, signature, args, options)
        parts = {part: given.pop(part) for part in _OWN}
        rate = given["learning_rate"] if wants_rate else given.pop("learning_rate")
        return _complete(scale_by(**given), rate, **parts, coupled=coupled)

    optimizer.__signature__ = signature  # type: ignore[attr-defined]
    optimizer.__name__ = optimizer.__qualname__ = name
    summary = (scale_by.__doc__ or "").partition("\n")[0]
    decay = "before" if coupled else "after"
    text = _DOC.format(summary=summary, scale_by=scale_by.__name__, decay=decay)
    optimizer.__doc__ = text + declaration_of(scale_by).example.of_optimizer(name) + "\n"
    return optimizer


_DOC = """{summary}

Args:
  learning_rate: a float, a scalar array or an optax schedule. With Adam grafting (the
    recommended preset where there is one) the learning rates of AdamW are the right ones to
    start from.
  **options: every argument of :func:`{scale_by}`.
  momentum: heavy-ball momentum AFTER preconditioning, as in the papers; None: none.
  nesterov: Nesterov's form of ``momentum``.
  weight_decay: decoupled weight decay, multiplied by the learning rate as in AdamW, added
    {decay} momentum.
  weight_decay_mask: tree of bools or function of the parameters: where decay applies.

Returns:
  A chain of {scale_by}, trace, add_decayed_weights and scale_by_learning_rate, without the
  parts that are off.

Raises:
  ValueError: as :func:`{scale_by}`.

Examples:
"""

shampoo = _alias(scale_by_shampoo)
kradagrad_star = _alias(scale_by_kradagrad_star)
kradagrad = _alias(scale_by_kradagrad)
kfac = _alias(scale_by_kfac)
rs_kfac = _alias(scale_by_rs_kfac)
sre_kfac = _alias(scale_by_sre_kfac)
b_kfac = _alias(scale_by_b_kfac)
br_kfac = _alias(scale_by_br_kfac)
bc_kfac = _alias(scale_by_bc_kfac)
brc_kfac = _alias(scale_by_brc_kfac)
ikfac = _alias(scale_by_ikfac, coupled=True)
ingd = _alias(scale_by_ingd, coupled=True)
singd = _alias(scale_by_singd, coupled=True)
sirfshampoo = _alias(scale_by_sirfshampoo, coupled=True)
soap = _alias(scale_by_soap)
kl_shampoo = _alias(scale_by_kl_shampoo)
kl_soap = _alias(scale_by_kl_soap)
tnt = _alias(scale_by_tnt)
ginger = _alias(scale_by_ginger)
