"""Captured factors against those of curvlinops and kfac-jax, recorded in the golden files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kradagrad_jax import curvature
from tests.curvature.zoo import quick
from tests.x64 import x64

DATA = Path(__file__).resolve().parents[1] / "golden" / "data"
SOFTMAX = curvature.losses.softmax_cross_entropy()


def load(name):
    return json.loads((DATA / f"{name}.json").read_text())


def arrays(tree):
    if isinstance(tree, dict):
        return {k: arrays(v) for k, v in tree.items()}
    return jnp.asarray(np.asarray(tree))


def torch_conv(p, x):
    numbers = ("NCHW", "OIHW", "NCHW")
    z = lax.conv_general_dilated(
        x, p["c.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers
    )
    h = jnp.tanh(z + p["c.bias"][:, None, None]).mean((2, 3))
    return h @ p["f.weight"].T + p["f.bias"]


def torch_sequence(p, x):
    h = jnp.tanh(x @ p["l0.weight"].T + p["l0.bias"]).mean(1)
    return h @ p["l1.weight"].T + p["l1.bias"]


@pytest.mark.parametrize(
    ("name", "model", "fisher", "approx"),
    [
        ("kfac_factors_conv_expand_empirical", torch_conv, "empirical", "expand"),
        ("kfac_factors_expand_type2", torch_sequence, "exact", "expand"),
        ("kfac_factors_reduce_type2", torch_sequence, "exact", "reduce"),
    ],
)
def test_factors_of_curvlinops(name, model, fisher, approx):
    with x64():
        case = load(name)
        params, x = arrays(case["inputs"]["params"]), arrays(case["inputs"]["x"])
        labels = jnp.asarray(case["inputs"]["y"])
        step = curvature.model_value_grad_and_curvature(model, SOFTMAX, fisher, reducer="raw")
        curv = quick(step, params, x, labels)[2]
        for layer in curv.spec.layers:
            short = layer.path.split(".")[0]
            grams = curv.grams(layer.path, approx)
            order = np.arange(layer.d_in)  # torch orders patches by channel first
            if layer.kind == "conv":
                order = np.moveaxis(order.reshape(layer.in_shape), -1, 0).reshape(-1)
            order = np.append(order, layer.d_in)
            a = grams.a[0][np.ix_(order, order)]
            np.testing.assert_allclose(a, case["outputs"]["A"][short], rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(
                grams.g[0], case["outputs"]["G"][short], rtol=1e-12, atol=1e-15
            )


def jax_model(kind):
    def model(p, x):
        first, second = p["l0"], p["l1"]
        if kind == "conv":
            numbers = ("NHWC", "HWIO", "NHWC")
            z = lax.conv_general_dilated(x, first["w"], (1, 1), "SAME", dimension_numbers=numbers)
        else:
            z = x @ first["w"]
        h = jnp.tanh(z + first["b"])
        h = h.mean(tuple(range(1, h.ndim - 1)))
        return h @ second["w"] + second["b"]

    return model


@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        ("kfac_mlp_ggn_exact", "exact"),
        ("kfac_mlp_empirical", "empirical"),
        ("kfac_conv", "empirical"),
        ("kfac_seq", "empirical"),
    ],
)
def test_inputs_and_output_gradients_of_kfac_jax(name, fisher):
    """The first step: recorded gradients, layer inputs and (pseudo-)gradients of the outputs."""
    with x64():
        case = load(name)["inputs"]
        x, labels = (jnp.asarray(np.asarray(b)) for b in case["batches"][0])
        params = arrays(case["params"])
        step = curvature.model_value_grad_and_curvature(
            jax_model(case["layers"]["l0"]), SOFTMAX, fisher, reducer="raw"
        )
        _, grads, curv = quick(step, params, x, labels.astype(int))
        n = len(x)
        for layer in ("l0", "l1"):
            for leaf in ("w", "b"):
                wanted = case["grads"][0][layer][leaf]
                np.testing.assert_allclose(grads[layer][leaf], wanted, rtol=1e-10, atol=1e-14)
            fields = [np.asarray(d[layer]) for d in case["dy"][0]]
            g = sum(f.reshape(-1, f.shape[-1]).T @ f.reshape(-1, f.shape[-1]) for f in fields) / n
            grams = curv.grams(f"{layer}/w")
            more = n if fisher == "empirical" else 1  # kfac-jax divides these by another n
            np.testing.assert_allclose(grams.g[0], more * g, rtol=1e-10, atol=1e-14)
            if (layer, case["layers"][layer]) != ("l0", "conv"):
                a = np.asarray(case["acts"][0][layer])
                a = a.reshape(-1, a.shape[-1])
                np.testing.assert_allclose(
                    grams.a[0][:-1, :-1], a.T @ a / len(a), rtol=1e-10, atol=1e-14
                )
        assert jax.tree.structure(grads) == jax.tree.structure(params)
