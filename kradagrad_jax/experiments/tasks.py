"""The registry of tasks, and those that are made of images. One line at the end per task."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.curvature import losses
from kradagrad_jax.experiments import data, models
from kradagrad_jax.experiments.names import UsageError, check_keys, lookup

Metrics = dict[str, jax.Array]


def _unwrapped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return tx


class Parts(NamedTuple):
    """A task's loss as a likelihood of a model's outputs, for methods that draw labels.

    Attributes:
      model: ``(params, inputs)`` to outputs z.
      examples: ``(data, batch)`` to ``(inputs, targets)``.
      likelihood: a loss of :mod:`kradagrad_jax.curvature`; its value is the task's loss.
    """

    model: Callable[[Any, Any], jax.Array]
    examples: Callable[[Any, jax.Array], tuple[Any, Any]]
    likelihood: Any


class Task(NamedTuple):
    """What is trained on what.

    Attributes:
      setup: seed to ``(params, data)``, two pytrees of arrays.
      loss: ``(params, data, batch)`` to the scalar that is differentiated.
      evaluate: ``(params, data)`` to scalars by name; ``"loss"`` among them decides comparisons.
      order: ``(seed, steps)`` to the batches: an array whose leading axis is ``steps``.
      wrap: goes around every optimizer of the task.
      x64: needs jax's 64-bit mode.
      parts: the loss taken apart; None where it is no likelihood.
      scan: run steps in a compiled loop. Not for convolutions: on CPU, XLA runs them in loops many
        times slower.
    """

    setup: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    evaluate: Callable[[Any, Any], Metrics]
    order: Callable[[int, int], np.ndarray]
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _unwrapped
    x64: bool = False
    parts: Parts | None = None
    scan: bool = True


class Entry(NamedTuple):
    """A registered task.

    Attributes:
      target: ``"module:function"`` of keyword options.
      summary: a line for ``list``.
      defaults: options that make the task what its name says.
      paper: what the option ``size = "paper"`` stands for: the size of the literature, for a GPU.
        Empty: the task has no such size.
    """

    target: str
    summary: str
    defaults: dict[str, Any]
    paper: dict[str, Any] = {}  # noqa: RUF012 - never written to


TASKS: dict[str, Entry] = {}


def register(
    name: str, target: str, summary: str, paper: dict[str, Any] | None = None, **defaults: Any
) -> None:
    """Adds a task to the registry under ``name``."""
    TASKS[name] = Entry(target, summary, defaults, paper or {})


def _sized(name: str, entry: Entry, options: dict[str, Any]) -> dict[str, Any]:
    """Options with ``size`` replaced by what it stands for; what is given beside it wins."""
    size = options.get("size", "small")
    if size not in ("small", "paper"):
        raise UsageError(f"task '{name}': size is 'small' or 'paper', got {size!r}")
    if size == "paper" and not entry.paper:
        raise UsageError(f"task '{name}' has one size only")
    given = {key: value for key, value in options.items() if key != "size"}
    return (entry.paper if size == "paper" else {}) | given


def make_task(name: str, options: dict[str, Any]) -> Task:
    """Builds a registered task.

    Args:
      name: key of the registry.
      options: arguments of its function; ``size`` = ``"paper"`` stands for those of the entry.

    Raises:
      UsageError: unknown name or option; the task's data is absent.
    """
    entry = lookup(TASKS, name, "task")
    module, attribute = entry.target.split(":")
    function = getattr(importlib.import_module(module), attribute)
    options = _sized(name, entry, options)
    known = [*inspect.signature(function).parameters, *(["size"] if entry.paper else [])]
    check_keys(options, known, f"task '{name}'")
    return function(**(entry.defaults | options))


def shuffled(size: int, batch_size: int) -> Callable[[int, int], np.ndarray]:
    """Batches without replacement within an epoch; an incomplete last batch is dropped."""

    def order(seed: int, steps: int) -> np.ndarray:
        rng, per_epoch = np.random.default_rng(seed), size // batch_size
        epochs = -(-steps // per_epoch)
        rows = [rng.permutation(size)[: per_epoch * batch_size] for _ in range(epochs)]
        return np.concatenate(rows).reshape(-1, batch_size)[:steps].astype(np.int32)

    return order


def supervised(
    model: Any, examples: Any, likelihood: Any, size: int, batch_size: int, **data: Any
) -> Task:
    """A task of inputs, targets and a likelihood.

    ``data``: the arrays ``train`` and ``valid``; ``examples(part, rows)``: inputs and targets.
    """
    parts = Parts(
        lambda params, inputs: model.apply({"params": params}, inputs),
        lambda both, batch: examples(both["train"], batch),
        likelihood,
    )

    def setup(seed: int) -> tuple[Any, Any]:
        both = jax.tree.map(jnp.asarray, data)
        first = parts.examples(both, jnp.arange(1))[0]
        return model.init(jax.random.key(seed), first)["params"], both

    def loss(params: Any, both: Any, batch: jax.Array) -> jax.Array:
        inputs, targets = parts.examples(both, batch)
        return likelihood.value(parts.model(params, inputs), targets)

    def evaluate(params: Any, both: Any) -> Metrics:
        inputs, targets = examples(both["valid"], slice(None))
        z = parts.model(params, inputs)
        metrics = {"loss": likelihood.value(z, targets)}
        if jnp.issubdtype(targets.dtype, jnp.integer):
            hits = jnp.argmax(z, -1) == targets
            metrics["accuracy"] = jnp.mean(hits, dtype=jnp.float32)
        return metrics

    return Task(setup, loss, evaluate, shuffled(size, batch_size), parts=parts)


def _load(source: str) -> data.Split:
    return {"digits": data.digits, "fashion": data.fashion_mnist}[source]()


def labelled(images: data.Images, rows: Any) -> tuple[Any, Any]:
    """Rows of images and their labels."""
    return images.x[rows], images.y[rows]


def itself(images: data.Images, rows: Any) -> tuple[Any, Any]:
    """Rows of images, as inputs and as targets."""
    return images.x[rows], images.x[rows]


def classifier(
    source: str = "digits", widths: Sequence[int] = (128, 128), batch_size: int = 100
) -> Task:
    """An MLP with hidden layers ``widths`` on ten classes, cross entropy."""
    split, likelihood = _load(source), losses.softmax_cross_entropy()
    size, model = len(split.train.x), models.MLP((*widths, 10))
    return supervised(model, labelled, likelihood, size, batch_size, **split._asdict())


def convnet(
    source: str = "digits", channels: Sequence[int] = (16, 32), batch_size: int = 100
) -> Task:
    """A small convolutional net on ten classes, cross entropy."""
    split, likelihood = _load(source), losses.softmax_cross_entropy()
    size, model = len(split.train.x), models.ConvNet(tuple(channels))
    task = supervised(model, labelled, likelihood, size, batch_size, **split._asdict())
    return task._replace(scan=False)


def autoencoder(
    source: str = "digits", widths: Sequence[int] = (128, 64, 32, 16), batch_size: int = 100
) -> Task:
    """Encoder ``widths`` and its mirror image, mean binary cross entropy per pixel."""
    split = _load(source)
    likelihood = losses.sigmoid_binary_cross_entropy(event_dims=0)  # every pixel is a loss term
    size, model = len(split.train.x), models.Autoencoder((split.train.x.shape[1], *widths))
    return supervised(model, itself, likelihood, size, batch_size, **split._asdict())


def characters(
    length: int = 64,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    batch_size: int = 16,
    valid_size: int = 64,
    limit: int | None = None,
    dtype: str = "float32",
) -> Task:
    """Next-character prediction on Python's help texts by a small transformer.

    Sequences do not overlap; ``valid_size`` of them, evenly spread, are for validation.
    """
    text = data.python_topics(limit)
    model = models.CharTransformer(len(text.characters), length, layers, width, heads, dtype)

    def cut(codes: np.ndarray, count: int | None) -> np.ndarray:
        rows = (len(codes) - 1) // length
        starts = length * np.unique(np.linspace(0, rows - 1, count or rows).astype(int))
        return codes[starts[:, None] + np.arange(length + 1)]

    def examples(sequences: jax.Array, rows: Any) -> tuple[jax.Array, jax.Array]:
        chosen = sequences[rows]
        return chosen[:, :-1], chosen[:, 1:]

    train, valid = cut(text.train, None), cut(text.valid, valid_size)
    likelihood = losses.softmax_cross_entropy()
    return supervised(model, examples, likelihood, len(train), batch_size, train=train, valid=valid)


_HERE, _QUADRATIC = "kradagrad_jax.experiments.tasks", "kradagrad_jax.experiments.quadratic"
_WORKLOADS = "kradagrad_jax.experiments.workloads"

register("quadratic", f"{_QUADRATIC}:quadratic", "tr(X' A X B), condition 1e20, full batch")
register("digits", f"{_HERE}:classifier", "MLP on scikit-learn's 8x8 digits")
register("digits_conv", f"{_HERE}:convnet", "Convolutional net on the same digits")
register("digits_autoencoder", f"{_HERE}:autoencoder", "Deep autoencoder of the same digits")
register(
    "fashion", f"{_HERE}:classifier", "MLP on Fashion-MNIST", source="fashion", widths=(512, 512)
)
register(
    "fashion_conv",
    f"{_HERE}:convnet",
    "Convolutional net on Fashion-MNIST",
    paper={"channels": (64, 128, 256)},
    source="fashion",
    channels=(16, 32, 32),
)
register(
    "fashion_autoencoder",
    f"{_HERE}:autoencoder",
    "Deep autoencoder of Fashion-MNIST",
    paper={"widths": (1000, 500, 250, 30)},  # which is the size of small, too
    source="fashion",
    widths=(1000, 500, 250, 30),
)
register(
    "characters",
    f"{_HERE}:characters",
    "Transformer on the characters of Python's help texts",
    paper={"layers": 4, "width": 256, "length": 128, "batch_size": 32},
)
register(
    "curves_autoencoder",
    f"{_WORKLOADS}:curves_autoencoder",
    "Deep autoencoder of curves-like images, drawn",
    paper={"widths": (400, 200, 100, 50, 25, 6), "train_size": 20_000, "valid_size": 10_000},
)
register("mnist1d", f"{_WORKLOADS}:mnist1d", "MLP on MNIST-1D (pip install mnist1d)")
register("mnist1d_conv", f"{_WORKLOADS}:mnist1d", "Convolutional net on MNIST-1D", kind="conv")
register(
    "matrix_factorisation",
    f"{_WORKLOADS}:matrix_factorisation",
    "Ratings of MovieLens' size, drawn, as low-rank matrix",
)
register(
    "graph_convolution",
    f"{_WORKLOADS}:graph_convolution",
    "Graph convolutions on stochastic block models",
    paper={"widths": (256, 256, 256), "nodes": 1000, "train_size": 200, "batch_size": 8},
)
