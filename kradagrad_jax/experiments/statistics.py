"""Loss, gradient and what else an optimizer needs to know of a task at one step."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kradagrad_jax import curvature
from kradagrad_jax.curvature.samples import sampled_gradients
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.tasks import Parts, Task

Measure = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any, dict]]


@dataclasses.dataclass(frozen=True)
class Capture:
    """Statistics beside the gradient.

    Attributes:
      kind: ``"layers"``: inputs and output gradients of layers; ``"samples"``: gradients at labels
        drawn from the model.
      fisher: ``"mc"``, ``"exact"`` or ``"empirical"`` (layers only).
      reducer: what is made of them (layers only), see :mod:`kradagrad_jax.curvature`.
      vectors: kind of the samples, see ``curvature.samples.curvature_vectors``.
      num_samples: draws of labels.
      every: steps between statistics.
    """

    kind: Literal["layers", "samples"] = "layers"
    fisher: str = "mc"
    reducer: str = "kron"
    vectors: str = "sampled"
    num_samples: int = 1
    every: int = 1


def _parts(task: Task) -> Parts:
    if task.parts is None:
        raise UsageError("this task's loss is no likelihood: the optimizer cannot be used on it")
    return task.parts


def spec_of(task: Task) -> Any:
    """What is known of the layers of a task's model."""
    parts = _parts(task)
    params, data = task.setup(0)
    inputs, _ = parts.examples(data, jnp.asarray(task.order(0, 1))[0])
    return curvature.inspect(parts.model, params, inputs)


def measure(task: Task, capture: Capture | None) -> Measure:
    """``(params, data, batch, key, step) -> (loss, gradient, further arguments of update)``."""
    if capture is None:

        def plain(params: Any, data: Any, batch: jax.Array, key: jax.Array, step: jax.Array) -> Any:
            del key, step
            return *jax.value_and_grad(task.loss)(params, data, batch), {}

        return plain
    parts = _parts(task)
    if capture.kind == "layers":
        take = curvature.model_value_grad_and_curvature(
            parts.model,
            parts.likelihood,
            fisher=capture.fisher,
            num_samples=capture.num_samples,
            reducer=capture.reducer,
        )
    else:
        take = sampled_gradients(
            parts.model,
            parts.likelihood,
            kind=capture.vectors,
            num_samples=capture.num_samples,
        )

    def with_statistics(
        params: Any, data: Any, batch: jax.Array, key: jax.Array, step: jax.Array
    ) -> Any:
        inputs, targets = parts.examples(data, batch)
        due = True if capture.every == 1 else step % capture.every == 0
        rng = jax.random.fold_in(key, step)
        value, grads, found = take(params, inputs, targets, rng=rng, update_stats=due)
        loss = value[0] if capture.kind == "samples" else value
        return loss, grads, {"curvature": found}

    return with_statistics
