"""Curvature of a likelihood: sampled labels, the exact Gauss-Newton matrix, or the true labels."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.assemble import over_directions
from kradagrad_jax.curvature.capture import AnyReducer, BatchArgnums, Run, Step
from kradagrad_jax.curvature.execute import Sinks
from kradagrad_jax.curvature.losses import Loss
from kradagrad_jax.curvature.prepare import prepare, report
from kradagrad_jax.curvature.reducers import as_reducer

Pull = Callable[[jax.Array], tuple[Sinks, list[Any]]]


def model_value_grad_and_curvature(
    model_fn: Callable[..., Any],
    loss: Loss,
    fisher: str = "mc",
    num_samples: int = 1,
    has_aux: bool = False,
    batch_argnums: BatchArgnums = None,
    reducer: AnyReducer = "kron",
) -> Step:
    """As :func:`value_grad_and_curvature` for a model and a likelihood.

    The forward pass runs once. ``"mc"`` draws labels from the model and needs one more backward
    pass per draw, through the activations only; ``"exact"`` needs one per output of a loss term;
    ``"empirical"`` needs none.

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs`` or, with ``has_aux``, ``(outputs, aux)``.
      loss: a loss of :mod:`kradagrad_jax.curvature.losses`; the value is its mean over terms.
      fisher: ``"mc"``, ``"exact"`` or ``"empirical"``.
      num_samples: draws of labels per step for ``"mc"``.
      has_aux: whether the model returns further results, such as batch statistics.
      batch_argnums: which of the arguments ``(params, inputs)`` carry the batch.
      reducer: see :class:`Reducer`.

    Returns:
      ``step(params, inputs, targets, *, rng=None, weights=None, update_stats=True, extra=None)``,
      which returns what the step of :func:`value_grad_and_curvature` does. ``rng`` is needed for
      ``"mc"``; ``weights`` are those of the loss terms. The number of loss terms comes from the
      loss: all axes of the outputs before the event axes count, so tokens are terms.

    Raises:
      ValueError: unknown ``fisher``; ``"mc"`` without ``rng``; see :func:`inspect`.

    References:
      Martens, `natural gradient <https://arxiv.org/abs/1412.1193>`_; Martens, Grosse,
      `K-FAC <https://arxiv.org/abs/1503.05671>`_, section 5.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from kradagrad_jax import curvature
      >>> loss = curvature.losses.softmax_cross_entropy()
      >>> step = curvature.model_value_grad_and_curvature(lambda p, x: x @ p["w"], loss)
      >>> x, labels = jnp.ones((5, 3)), jnp.zeros(5, int)
      >>> value, grads, curv = step({"w": jnp.ones((3, 2))}, x, labels, rng=jax.random.key(0))
      >>> curv.grams("w").g.shape
      (1, 2, 2)
    """
    how = as_reducer(reducer)
    if fisher not in ("mc", "exact", "empirical"):
        raise ValueError(f"fisher must be 'mc', 'exact' or 'empirical', got {fisher!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    told: set[Any] = set()

    def step(
        params: Any,
        inputs: Any,
        targets: Any,
        *,
        rng: jax.Array | None = None,
        weights: Any = None,
        update_stats: Any = True,
        extra: Mapping[str, Any] | None = None,
    ) -> Any:
        if fisher == "mc" and rng is None:
            raise ValueError("fisher='mc' draws labels from the model: pass rng=key")
        ready = prepare(model_fn, params, (inputs,), batch_argnums)
        ready.check_results(has_aux, "model_fn", scalar=False)
        report(ready, told)
        output: Any = ready.output  # only its shape and dtype are read
        terms = jnp.asarray(loss.terms(output, weights), jnp.result_type(float))
        # cotangents of the mean loss are divided by the number of terms, pseudo-gradients are not
        scale = terms if fisher == "empirical" else jnp.ones_like(terms)
        run = Run(ready, how, update_stats, extra, scale)
        leaves, tree = jax.tree.flatten(params)
        results = functools.partial(run.results, has_aux=has_aux)
        z, pull, aux = jax.vjp(results, run.sinks, leaves, has_aux=True)
        value, dz = jax.value_and_grad(loss.value)(z, targets, weights)
        stats, grads = pull(dz)
        if rng is not None and fisher == "mc":
            keys = jax.random.split(rng, num_samples)
            draws = jax.vmap(lambda key: loss.pseudo_gradient(key, z, targets, weights))(keys)
            stats = _directions(pull, draws, True)
        elif fisher == "exact":
            stats = _directions(pull, loss.sqrt_columns(z, targets, weights), False)
        result = (value, aux) if has_aux else value
        return result, tree.unflatten(grads), run.curvature(stats, terms)

    return step


def _directions(pull: Pull, cotangents: jax.Array, average: bool) -> Sinks:
    """Statistics of several output directions; one of them needs no mapping."""
    if cotangents.shape[0] == 1:
        return pull(cotangents[0])[0]
    return over_directions(jax.vmap(lambda s: pull(s)[0])(cotangents), average)
