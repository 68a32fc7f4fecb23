"""``sum over uses of a^T g`` is the gradient; raw rows rebuild the gradient of every example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import curvature
from kradagrad_jax.engine.trees import paths_of
from tests.curvature import zoo
from tests.curvature.zoo import quick
from tests.x64 import x64


def per_example(curv, layer):
    """Gradients of single examples from raw statistics: ``(N, *shape)``."""
    total = 0
    for part in curv.stats[layer.path]:
        g = part["g"][:, 0] * part["scale"]
        if "ids" in part:
            onehot = jax.nn.one_hot(part["ids"].astype(int), layer.d_in, dtype=g.dtype)
            w = jnp.einsum("snri,snrj->nsij", onehot, g)
        else:
            w = jnp.einsum("snri,snrj->nsij", part["a"], g)
            if layer.tied:
                w = jnp.swapaxes(w, 2, 3)
        total = total + w
    return jax.vmap(layer.from_matrix)(total)


def per_example_bias(curv, layer):
    total = 0
    for part in curv.stats[layer.path]:
        total = total + jnp.einsum("snrj->nsj", part["g"][:, 0] * part["scale"])[:, :, None]
    return jax.vmap(layer.bias_view.from_matrix)(total)


def brute_force(loss, params, batch):
    def one(*example):
        return jax.value_and_grad(loss)(params, *(v[None] for v in example))

    return jax.vmap(one)(*batch)


@pytest.mark.parametrize("name", sorted(zoo.ENTRIES))
def test_identity_and_per_example_gradients(name):
    with x64():
        loss, params, batch = zoo.ENTRIES[name]()
        step = curvature.value_grad_and_curvature(loss, reducer="raw")

        def everything(params, *batch):
            value, grads, curv = step(params, *batch)
            layers = curv.spec.layers
            weights = {x.path: per_example(curv, x) for x in layers}
            biases = {x.bias: per_example_bias(curv, x) for x in layers if x.bias}
            single = [p for p, held in curv.stats.items() if "D" in held[0] and len(held) == 1]
            squares = {p: curv.diagonal(p) for p in single}
            grams = {x.path: curv.grams(x.path) for x in layers}
            return value, grads, curv, weights | biases, squares, grams

        value, grads, curv, found, squares, grams = quick(everything, params, *batch)
        spec, paths = curv.spec, paths_of(params)
        assert all(leaf.status == "full" for leaf in spec.leaves), str(spec)
        layers = {layer.path for layer in spec.layers}
        biases = {layer.bias for layer in spec.layers}
        assert set(curv.stats) | biases >= set(paths), str(spec)
        values, gradients = quick(lambda p, *b: brute_force(loss, p, b), params, *batch)
        truth = dict(zip(paths, jax.tree.leaves(gradients), strict=True))
        np.testing.assert_allclose(value, np.mean(values), rtol=1e-14)
        scale = max(float(np.abs(g).max()) for g in truth.values())
        for g, path in zip(jax.tree.leaves(grads), paths, strict=True):
            np.testing.assert_allclose(g, np.mean(truth[path], 0), rtol=0, atol=1e-14 * scale)
        for path, gradients in found.items():
            np.testing.assert_allclose(gradients, truth[path], rtol=0, atol=2e-14 * scale)
        for path, square in squares.items():
            if name != "rnn":  # there the steps of time count as examples
                np.testing.assert_allclose(square, np.mean(truth[path] ** 2, 0), rtol=1e-12)
        for path in layers:
            positions = sum(p["g"][0].size // p["g"].shape[-1] for p in curv.stats[path])
            check_factors(grams[path], positions)


def check_factors(grams, positions):
    """Symmetric, positive semidefinite, of a rank that the number of positions bounds."""
    for factor in (x for x in grams if x.ndim == 3):
        tiny = 1e-14 * np.abs(factor).max()
        np.testing.assert_allclose(factor, np.swapaxes(factor, 1, 2), rtol=0, atol=tiny)
        w = np.linalg.eigvalsh(factor)
        assert np.all(w >= -1e-12 * w.max())
    if grams.a.ndim == 3:
        assert np.linalg.matrix_rank(grams.a, tol=1e-9 * np.max(grams.a)).max() <= positions


@pytest.mark.parametrize("name", ["branches", "fused_qkv", "rnn", "tied"])
def test_check_measures_the_identity(name):
    with x64():
        loss, params, batch = zoo.ENTRIES[name]()
        residuals = curvature.check(loss, params, *batch, verbose=False)
        assert residuals and max(residuals.values()) < 2e-15


def test_check_prints_a_table(capsys):
    loss, params, batch = zoo.mlp()
    curvature.check(loss, params, *batch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["parameter", "status", "residual"]
    assert "with w1" in lines[1]
