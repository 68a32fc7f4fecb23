"""Coverage and exactness on flax.linen and flax.nnx models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kradagrad_jax import curvature
from kradagrad_jax.engine.trees import paths_of
from tests.curvature import flax_models as models
from tests.curvature.test_identity import per_example, per_example_bias
from tests.curvature.zoo import quick
from tests.x64 import x64

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((3, 6, 6, 2))
IDS = RNG.integers(0, 11, (3, 5))
SERIES = RNG.standard_normal((3, 5, 2))


def softplus_loss(z):
    weights = jnp.cos(jnp.arange(z[0].size, dtype=z.dtype)).reshape(z.shape[1:])
    return jnp.mean(jnp.sum(weights * jax.nn.softplus(z), axis=tuple(range(1, z.ndim))))


def doubled(tree):
    return jax.tree.map(lambda p: p.astype(jnp.float64), tree)


def linen(model, x):
    x = jnp.asarray(x)
    params = doubled(model.init(jax.random.key(0), x)["params"])
    return lambda p, x: softplus_loss(model.apply({"params": p}, x)), params, x


def nnx_model(make, x):
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    params = doubled(params)
    return lambda p, x: softplus_loss(nnx.merge(graph, p, rest)(x)), params, jnp.asarray(x)


WideLM = partial(models.NnxLM, dtype=jnp.float64)
CASES = {
    "cnn": lambda: linen(models.CNN(), IMAGES),
    "lm": lambda: linen(models.LM(), IDS),
    "lm_scanned": lambda: linen(models.LM(scan=True), IDS),
    "lstm": lambda: linen(models.LSTM(fast=False), SERIES),
    "lstm_fast": lambda: linen(models.LSTM(fast=True), SERIES),
    "nnx_lm": lambda: nnx_model(WideLM, IDS),
    "nnx_lm_scanned": lambda: nnx_model(partial(WideLM, scan=True), IDS),
}


SLOW = ("cnn", "lm", "nnx_lm_scanned")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_every_leaf_and_every_example(name):
    with x64():
        loss, params, x = CASES[name]()
        step = curvature.value_grad_and_curvature(loss, reducer="raw")

        def everything(params, x):
            _, grads, curv = step(params, x)
            layers = curv.spec.layers
            weights = {v.path: per_example(curv, v) for v in layers}
            biases = {v.bias: per_example_bias(curv, v) for v in layers if v.bias}
            truth = jax.vmap(lambda e: jax.grad(loss)(params, e[None]))(x)
            return grads, curv.scale_cotangents(0.0), weights | biases, truth

        grads, curv, found, truth = quick(everything, params, x)
        assert all(leaf.status == "full" for leaf in curv.spec.leaves), str(curv.spec)
        by_path = dict(zip(paths_of(params), jax.tree.leaves(truth), strict=True))
        scale = max(float(np.abs(g).max()) for g in by_path.values())
        if name.startswith("nnx"):
            scale *= 1e7  # nnx's attention computes partly in float32
        for g, path in zip(jax.tree.leaves(grads), paths_of(params), strict=True):
            np.testing.assert_allclose(g, by_path[path].mean(0), rtol=0, atol=1e-14 * scale)
        for path, gradients in found.items():
            np.testing.assert_allclose(gradients, by_path[path], rtol=0, atol=2e-14 * scale)


def test_batch_norm_in_training_mode():
    """The scale meets rsqrt(var) before it meets the batch; state comes back as aux."""
    with x64():
        model, x = models.BatchNormNet(), jnp.asarray(RNG.standard_normal((6, 4)))
        variables = model.init(jax.random.key(0), x)
        params, stats = doubled(variables["params"]), variables["batch_stats"]

        def loss(params, x, stats):
            z, new = model.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return softplus_loss(z), new["batch_stats"]

        step = curvature.value_grad_and_curvature(loss, has_aux=True, batch_argnums=1)
        (value, aux), grads, curv = quick(step, params, x, stats)
        plain = jax.value_and_grad(loss, has_aux=True)
        (value0, aux0), grads0 = quick(plain, params, x, stats)
        np.testing.assert_allclose(value, value0, rtol=1e-14)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-14, atol=1e-15), grads, grads0)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-14), aux, aux0)
        assert all(leaf.status == "full" for leaf in curv.spec.leaves), str(curv.spec)
        residuals = curvature.check(
            loss, params, x, stats, has_aux=True, batch_argnums=1, verbose=False
        )
        assert max(residuals.values()) < 2e-15
        assert "BatchNorm_0/scale" in residuals


def test_nnx_convenience_updates_state_and_gives_gradients():
    def loss(model, x):
        return softplus_loss(model(x)), x.shape[0]

    x = jnp.asarray(IMAGES, jnp.float32)
    model, plain = models.NnxCNN(nnx.Rngs(0)), models.NnxCNN(nnx.Rngs(0))
    step = nnx.jit(curvature.nnx_value_grad_and_curvature(loss, has_aux=True))
    (value, aux), grads, curv = step(model, x)
    (value0, _), grads0 = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(plain, x)
    assert aux == 3
    np.testing.assert_allclose(value, value0, rtol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, nnx.to_pure_dict(grads), nnx.to_pure_dict(grads0))
    close(model.norm.mean[...], plain.norm.mean[...])
    assert {layer.path for layer in curv.spec.layers} == {"conv/kernel", "head/kernel"}


def test_paths_agree_between_boxed_and_pure_states():
    params = nnx.state(models.NnxLM(nnx.Rngs(0)), nnx.Param)
    pure = nnx.to_pure_dict(params)
    assert sorted(paths_of(params)) == sorted(paths_of(pure))


def test_input_groups_of_attention():
    with x64():
        loss, params, x = CASES["lm"]()
        spec = curvature.inspect(loss, params, x)
    block = "Block_0/MultiHeadDotProductAttention_0"
    groups = {spec.leaf(f"{block}/{k}/kernel").input_group for k in ("query", "key", "value")}
    assert len(groups) == 1 and groups != {None}
    assert spec.leaf(f"{block}/out/kernel").input_group is None
