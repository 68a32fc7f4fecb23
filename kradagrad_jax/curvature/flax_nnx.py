"""Capture for flax.nnx models; flax is imported when it is used."""

from collections.abc import Callable
from typing import Any

from kradagrad_jax.curvature.capture import Step, value_grad_and_curvature


def nnx_value_grad_and_curvature(
    loss_fn: Callable[..., Any], has_aux: bool = False, **options: Any
) -> Step:
    """As ``nnx.value_and_grad``, with curvature: for losses ``loss_fn(model, *args)``.

    The parameters are the model's ``nnx.Param`` variables. Other state (batch statistics, random
    number streams) is updated in the model, as by ``nnx.value_and_grad``.

    Args:
      loss_fn: ``loss_fn(model, *args) -> loss`` or, with ``has_aux``, ``(loss, aux)``.
      has_aux: whether ``loss_fn`` returns further results.
      **options: those of :func:`value_grad_and_curvature`. ``loss_terms`` must be a number;
        ``batch_argnums`` counts as in ``loss_fn(model, *args)``.

    Returns:
      ``step(model, *args, update_stats=True, extra=None, loss_scale=None)``, which returns what
      the step of :func:`value_grad_and_curvature` does, the gradients as ``nnx.State``. Use it
      under ``nnx.jit``, and ``nnx.Optimizer.update(model, grads, curvature=curvature)``.

    Raises:
      ImportError: flax is not installed.
    """
    from flax import nnx

    def step(model: Any, *args: Any, **keywords: Any) -> Any:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def pure(params: Any, *values: Any) -> Any:
            merged = nnx.merge(graph, params, values[-1])
            out = loss_fn(merged, *values[:-1])
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, nnx.split(merged, nnx.Param, ...)[2])

        how = {"batch_argnums": range(1, len(args) + 1), **options}
        capture = value_grad_and_curvature(pure, has_aux=True, **how)
        (loss, (aux, after)), grads, curvature = capture(params, *args, rest, **keywords)
        nnx.update(model, after)
        return ((loss, aux) if has_aux else loss), grads, curvature

    return step
