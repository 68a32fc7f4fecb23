"""Data that is drawn, not loaded: equal for equal seeds, offline, of any size."""

from typing import NamedTuple

import numpy as np

from kradagrad_jax.experiments.names import UsageError


def curves_like(count: int, seed: int = 0, side: int = 28, samples: int = 64) -> np.ndarray:
    """Images of one curve each, drawn from three random points; ``(count, side * side)`` float32.

    A stand-in for the CURVES data of the literature, whose generator was never published; numbers
    on the two do not compare. The points are uniform, two pixels from the border, and control a
    quadratic Bezier curve; a pixel has ``clip(1.5 - distance, 0, 1)``.

    Args:
      count: number of images.
      seed: of the points.
      side: pixels per row.
      samples: points on a curve to which distances are taken.
    """
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, samples)
    points = rng.uniform(2, side - 3, (count, 3, 2))
    bernstein = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    curves = np.einsum("ks,nkd->nds", bernstein, points)
    grid = np.arange(side)[:, None]
    images = np.empty((count, side * side), np.float32)
    for image, (x, y) in zip(images, curves, strict=True):
        rows, columns = (y - grid) ** 2, (x - grid) ** 2
        distance = np.sqrt((rows[:, None] + columns[None]).min(axis=-1))
        image[:] = np.clip(1.5 - distance, 0, 1).ravel()
    return images


class Ratings(NamedTuple):
    """Observed entries of a matrix of users and items.

    Attributes:
      pairs: ``(n, 2)`` int32, user and item.
      values: ``(n,)`` float32, 0.5 to 5.
    """

    pairs: np.ndarray
    values: np.ndarray


def ratings(
    users: int = 671, items: int = 9066, count: int = 100_000, rank: int = 8, seed: int = 0
) -> Ratings:
    """Ratings of MovieLens' size: a low-rank matrix plus offsets and noise, in half stars.

    Users and items are chosen with Zipf-like frequencies, no pair twice, in random order.

    Args:
      users: number of rows.
      items: number of columns.
      count: observed entries.
      rank: of the matrix behind them.
      seed: of everything.

    Raises:
      UsageError: more entries than a third of the matrix.
    """
    if 3 * count > users * items:
        raise UsageError(f"{count} ratings do not fit {users} users and {items} items sparsely")
    rng = np.random.default_rng(seed)

    def chosen(size: int) -> np.ndarray:
        weights = 1 / (10 + np.arange(size)) ** 0.8
        return rng.choice(size, 4 * count, p=weights / weights.sum())

    cells = np.unique(chosen(users) * items + chosen(items))
    cells = rng.permutation(cells)[:count]
    if len(cells) < count:  # frequent pairs came up too often
        free = np.setdiff1d(np.arange(users * items), cells)
        cells = np.concatenate([cells, rng.choice(free, count - len(cells), replace=False)])
    pairs = np.stack(np.divmod(cells, items), axis=1).astype(np.int32)
    u, v = (rng.standard_normal((size, rank)) for size in (users, items))
    offsets = 0.4 * rng.standard_normal(users)[pairs[:, 0]]
    offsets += 0.5 * rng.standard_normal(items)[pairs[:, 1]]
    inner = np.sum(u[pairs[:, 0]] * v[pairs[:, 1]], axis=1) / np.sqrt(rank)
    raw = 3.5 + offsets + 0.7 * inner + 0.5 * rng.standard_normal(count)
    return Ratings(pairs, (np.clip(np.round(2 * raw), 1, 10) / 2).astype(np.float32))


class Graphs(NamedTuple):
    """Graphs of equal size.

    Attributes:
      features: ``(graphs, nodes, features)`` float32.
      adjacency: ``(graphs, nodes, nodes)`` float32, ``D^-1/2 (A + I) D^-1/2``.
      labels: ``(graphs, nodes)`` int32, the block of every node.
    """

    features: np.ndarray
    adjacency: np.ndarray
    labels: np.ndarray


def block_graphs(
    count: int,
    nodes: int = 100,
    blocks: int = 4,
    features: int = 16,
    inside: float = 0.15,
    across: float = 0.03,
    noise: float = 2.0,
    seed: int = 0,
) -> Graphs:
    """Graphs of a stochastic block model, with features that tell little of a node alone.

    Args:
      count: number of graphs.
      nodes: of a graph.
      blocks: communities; the one of a node is drawn uniformly.
      features: of a node: its block's mean (the same in all graphs) plus ``noise`` times a normal.
      inside: probability of an edge within a block.
      across: the same between blocks.
      noise: see ``features``.
      seed: of the graphs; the means of the blocks are always the same.
    """
    means = np.random.default_rng(0).standard_normal((blocks, features))
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(blocks, size=(count, nodes))
    same = labels[:, :, None] == labels[:, None, :]
    edges = np.triu(rng.random((count, nodes, nodes)) < np.where(same, inside, across), 1)
    adjacency = edges + edges.transpose(0, 2, 1) + np.eye(nodes)
    scale = adjacency.sum(axis=-1) ** -0.5
    adjacency *= scale[:, :, None] * scale[:, None, :]
    x = means[labels] + noise * rng.standard_normal((count, nodes, features))
    return Graphs(x.astype(np.float32), adjacency.astype(np.float32), labels.astype(np.int32))
