"""The registry of tasks, and those that are made of images. One line at the end per task."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.experiments import data, models
from kradagrad_jax.experiments.names import check_keys, lookup

Metrics = dict[str, jax.Array]


def _unwrapped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return tx


class Task(NamedTuple):
    """What is trained on what.

    Attributes:
      setup: seed to ``(params, data)``, two pytrees of arrays.
      loss: ``(params, data, batch)`` to the scalar that is differentiated.
      evaluate: ``(params, data)`` to scalars by name; ``"loss"`` among them decides comparisons.
      order: ``(seed, steps)`` to the batches: an array whose leading axis is ``steps``.
      wrap: goes around every optimizer of the task.
      x64: needs jax's 64-bit mode.
    """

    setup: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    evaluate: Callable[[Any, Any], Metrics]
    order: Callable[[int, int], np.ndarray]
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _unwrapped
    x64: bool = False


class Entry(NamedTuple):
    """A registered task: ``"module:function"`` of keyword options, and a line for ``list``."""

    target: str
    summary: str
    defaults: dict[str, Any]


TASKS: dict[str, Entry] = {}


def register(name: str, target: str, summary: str, **defaults: Any) -> None:
    """Adds a task to the registry under ``name``."""
    TASKS[name] = Entry(target, summary, defaults)


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Builds a registered task.

    Raises:
      UsageError: unknown name or option; the task's data is absent.
    """
    entry = lookup(TASKS, name, "task")
    module, attribute = entry.target.split(":")
    function = getattr(importlib.import_module(module), attribute)
    check_keys(options, inspect.signature(function).parameters, f"task '{name}'")
    return function(**(entry.defaults | options))


def shuffled(size: int, batch_size: int) -> Callable[[int, int], np.ndarray]:
    """Batches without replacement within an epoch; an incomplete last batch is dropped."""

    def order(seed: int, steps: int) -> np.ndarray:
        rng, per_epoch = np.random.default_rng(seed), size // batch_size
        epochs = -(-steps // per_epoch)
        rows = [rng.permutation(size)[: per_epoch * batch_size] for _ in range(epochs)]
        return np.concatenate(rows).reshape(-1, batch_size)[:steps].astype(np.int32)

    return order


def _image_task(
    split: data.Split, model: Any, batch_size: int, metrics: Callable[..., Metrics]
) -> Task:
    """A task whose loss is ``metrics(logits, images, labels)["loss"]``."""
    train, valid = jax.tree.map(jnp.asarray, split)

    def setup(seed: int) -> tuple[Any, Any]:
        return model.init(jax.random.key(seed), train.x[:1])["params"], (train, valid)

    def measure(params: Any, images: data.Images) -> Metrics:
        return metrics(model.apply({"params": params}, images.x), images.x, images.y)

    def loss(params: Any, both: Any, batch: jax.Array) -> jax.Array:
        return measure(params, jax.tree.map(lambda a: a[batch], both[0]))["loss"]

    def evaluate(params: Any, both: Any) -> Metrics:
        return measure(params, both[1])

    return Task(setup, loss, evaluate, shuffled(len(train.x), batch_size))


def _load(source: str) -> data.Split:
    return {"digits": data.digits, "fashion": data.fashion_mnist}[source]()


def classifier(
    source: str = "digits", widths: Sequence[int] = (128, 128), batch_size: int = 100
) -> Task:
    """An MLP with hidden layers ``widths`` on ten classes, cross entropy."""

    def metrics(logits: jax.Array, x: jax.Array, y: jax.Array) -> Metrics:
        del x
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == y, dtype=jnp.float32)}

    return _image_task(_load(source), models.MLP((*widths, 10)), batch_size, metrics)


def autoencoder(
    source: str = "digits", widths: Sequence[int] = (128, 64, 32, 16), batch_size: int = 100
) -> Task:
    """Encoder ``widths`` and its mirror image, mean binary cross entropy per pixel."""

    def metrics(logits: jax.Array, x: jax.Array, y: jax.Array) -> Metrics:
        del y
        return {"loss": optax.sigmoid_binary_cross_entropy(logits, x).mean()}

    split = _load(source)
    model = models.Autoencoder((split.train.x.shape[1], *widths))
    return _image_task(split, model, batch_size, metrics)


_HERE, _QUADRATIC = "kradagrad_jax.experiments.tasks", "kradagrad_jax.experiments.quadratic"

register("quadratic", f"{_QUADRATIC}:quadratic", "tr(X' A X B), condition 1e20, full batch")
register("digits", f"{_HERE}:classifier", "MLP on scikit-learn's 8x8 digits")
register("digits_autoencoder", f"{_HERE}:autoencoder", "Deep autoencoder of the same digits")
register(
    "fashion", f"{_HERE}:classifier", "MLP on Fashion-MNIST", source="fashion", widths=(512, 512)
)
register(
    "fashion_autoencoder",
    f"{_HERE}:autoencoder",
    "Deep autoencoder of Fashion-MNIST",
    source="fashion",
    widths=(1000, 500, 250, 30),
)
