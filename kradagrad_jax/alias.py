"""Complete optimizers: a ``scale_by_*`` transformation with momentum, decay and learning rate."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad, scale_by_kradagrad_star
from kradagrad_jax.transforms.shampoo import scale_by_shampoo

Mask = Any | Callable[[optax.Params], Any] | None


def _complete(
    scale_by: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any,
    nesterov: bool,
    weight_decay: Any,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """The chain; parts that are statically off are left out (``params=None`` then works)."""
    parts = [scale_by]
    if momentum is not None:
        parts.append(optax.trace(momentum, nesterov))
    if weight_decay is not None and not (
        isinstance(weight_decay, (int, float)) and not weight_decay
    ):
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(optax.chain(*parts))


def _alias(
    scale_by: Callable[..., optax.GradientTransformation], summary: str
) -> Callable[..., Any]:
    """The complete optimizer of a transformation.

    Its signature (which ``optax.inject_hyperparams`` reads) is spelled out from that of
    ``scale_by``, so that every argument is stated once.
    """
    name = scale_by.__name__.removeprefix("scale_by_")

    def optimizer(
        learning_rate: optax.ScalarOrSchedule,
        *,
        momentum: Any = None,
        nesterov: bool = False,
        weight_decay: Any = None,
        weight_decay_mask: Mask = None,
        **options: Any,
    ) -> optax.GradientTransformationExtraArgs:
        parts = (learning_rate, momentum, nesterov, weight_decay, weight_decay_mask)
        return _complete(scale_by(**options), *parts)

    own = list(inspect.signature(optimizer).parameters.values())[:-1]
    inherited = list(inspect.signature(scale_by).parameters.values())
    optimizer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [own[0], *inherited, *own[1:]],
        return_annotation=optax.GradientTransformationExtraArgs,
    )
    optimizer.__name__ = optimizer.__qualname__ = name
    optimizer.__doc__ = summary + _DOC.format(name=name, scale_by=scale_by.__name__)
    return optimizer


_DOC = """

    Args:
      learning_rate: a float, a scalar array or an optax schedule. With Adam grafting (the
        recommended preset) the learning rates of AdamW are the right ones to start from.
      momentum: heavy-ball momentum AFTER preconditioning, as in the papers; None: none (``beta1``
        of the recommended preset already averages gradients before it).
      nesterov: Nesterov's form of ``momentum``.
      weight_decay: decoupled weight decay, multiplied by the learning rate as in AdamW.
      weight_decay_mask: tree of bools or function of the parameters: where decay applies.
      **options: every argument of :func:`{scale_by}`, ``preset`` first of all.

    Returns:
      ``chain({scale_by}, trace, add_decayed_weights, scale_by_learning_rate)`` without the parts
      that are off.

    Raises:
      ValueError: as :func:`{scale_by}`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> params = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}
      >>> tx = kj.{name}(1e-2, weight_decay=1e-4)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum((p["w"] + p["b"]) ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
"""

shampoo = _alias(
    scale_by_shampoo,
    "Shampoo (arXiv 1802.09568): Kronecker-factored full-matrix AdaGrad.",
)
kradagrad_star = _alias(
    scale_by_kradagrad_star,
    "KrADagrad* (arXiv 2305.19416): Shampoo's idea with inverse statistics and positive roots.",
)
kradagrad = _alias(
    scale_by_kradagrad,
    "KrADagrad (arXiv 2305.19416, Algorithm 2): one factor updated per step, square roots only.",
)
