"""Curvature of likelihoods against Jacobians, and sampled against exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import curvature
from kradagrad_jax.curvature import losses
from tests.curvature.zoo import draw, quick
from tests.x64 import x64

N, HIDDEN, OUT = 7, 5, 3


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def setup():
    d = draw(7)
    params = {"w": d(4, HIDDEN), "b": d(HIDDEN), "v": d(HIDDEN, OUT)}
    return params, d(N, 4), d(N, OUT), jnp.asarray([0, 1, 2, 0, 1, 2, 2]), jnp.arange(1.0, N + 1)


LOSSES = {
    "softmax": (losses.softmax_cross_entropy(), "labels"),
    "sigmoid": (losses.sigmoid_binary_cross_entropy(), "bits"),
    "squared": (losses.squared_error(2 / OUT), "values"),
    "generic": (losses.generic(lambda z, t: jnp.sum(jnp.cosh(z - t))), "values"),
}


def targets_of(kind, values, labels):
    return {"labels": labels, "bits": (values > 0).astype(values.dtype), "values": values}[kind]


def truth(loss, params, x, targets, weights):
    """``sum_n w_n J_n^T H_n J_n / M`` at the hidden pre-activations."""

    def from_hidden(shift, x):
        return jnp.tanh(x @ params["w"] + params["b"] + shift) @ params["v"]

    def one(x, t, w):
        jacobian = jax.jacobian(from_hidden)(jnp.zeros(HIDDEN), x)
        z = from_hidden(jnp.zeros(HIDDEN), x)
        hessian = jax.hessian(lambda z: loss.per_term(z[None], t[None])[0])(z)
        return w * jacobian.T @ hessian @ jacobian

    weights = jnp.ones(N) if weights is None else weights
    return jnp.sum(jax.vmap(one)(x, targets, weights), 0) / jnp.sum(weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_exact_factor_of_a_hidden_layer(name, weighted):
    with x64():
        params, x, values, labels, weights = setup()
        loss, kind = LOSSES[name]
        targets = targets_of(kind, values, labels)
        w = weights if weighted else None

        def everything(params, x, targets):
            make = curvature.model_value_grad_and_curvature
            out = [
                make(model, loss, fisher="exact", reducer=r)(params, x, targets, weights=w)
                for r in ("kron", "raw")
            ]
            plain = jax.value_and_grad(lambda p: loss.value(model(p, x), targets, w))(params)
            wanted = truth(loss, params, x, targets, w)
            return out[1][:2], plain, wanted, [c.grams("w") for _, _, c in out], out[1][2].rows("w")

        (value, grads), plain, wanted, grams, rows = quick(everything, params, x, targets)
        inputs = np.concatenate([x, np.ones((N, 1))], 1)
        for found in grams:
            size = np.abs(wanted).max()
            np.testing.assert_allclose(found.g[0], wanted, rtol=0, atol=1e-14 * size)
            np.testing.assert_allclose(found.a[0], inputs.T @ inputs / N, rtol=1e-13)
        assert rows.a.shape[1] == rows.g.shape[1] == N * OUT
        a, g = np.asarray(rows.a[0]), np.asarray(rows.g[0])
        np.testing.assert_allclose(a.T @ a, grams[0].a[0], rtol=1e-12)
        np.testing.assert_allclose(g.T @ g, grams[0].g[0], rtol=1e-11)
        np.testing.assert_allclose(value, plain[0], rtol=1e-14)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), grads, plain[1])


@pytest.mark.parametrize("name", LOSSES)
def test_draws_tend_to_the_exact_factor(name):
    with x64():
        params, x, values, labels, _ = setup()
        loss, kind = LOSSES[name]
        targets = targets_of(kind, values, labels)
        exact = curvature.model_value_grad_and_curvature(model, loss, fisher="exact")
        mc = curvature.model_value_grad_and_curvature(model, loss, num_samples=3000)

        def both(params, x, targets):
            found = mc(params, x, targets, rng=jax.random.key(1))[2].grams("w").g
            return exact(params, x, targets)[2].grams("w").g, found

        wanted, found = quick(both, params, x, targets)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


def test_one_draw_differs_by_key_and_raw_agrees_with_sums():
    params, x, _, labels, _ = setup()
    make = curvature.model_value_grad_and_curvature
    kron = make(model, losses.softmax_cross_entropy(), num_samples=2)
    raw = make(model, losses.softmax_cross_entropy(), num_samples=2, reducer="raw")
    keys = jax.random.split(jax.random.key(0))

    def both(params, x, labels, key):
        sums = kron(params, x, labels, rng=key)[2].grams("w").g[0]
        return sums, raw(params, x, labels, rng=key)[2].rows("w").g[0]

    (one, rows), (two, _) = (quick(both, params, x, labels, k) for k in keys)
    assert not np.allclose(one, two)
    np.testing.assert_allclose(np.asarray(rows).T @ rows, one, rtol=1e-4)


def test_empirical_equals_the_capture_of_the_loss():
    with x64():
        params, x, _, labels, weights = setup()
        loss = losses.softmax_cross_entropy()
        of_model = curvature.model_value_grad_and_curvature(model, loss, fisher="empirical")
        _, grads, one = jax.jit(of_model)(params, x, labels, weights=weights)
        of_loss = curvature.value_grad_and_curvature(
            lambda p, x, t, w: loss.value(model(p, x), t, w), loss_terms=jnp.sum(weights)
        )
        _, grads2, two = jax.jit(of_loss)(params, x, labels, weights)
        np.testing.assert_allclose(one.grams("w").g, two.grams("w").g, rtol=1e-13)
        np.testing.assert_allclose(grads["w"], grads2["w"], rtol=1e-13)


def test_tokens_are_loss_terms():
    d = draw(8)
    params, x = {"w": d(4, 3)}, d(5, 6, 4)
    labels = jnp.zeros((5, 6), int)
    loss = losses.softmax_cross_entropy()
    of_model = curvature.model_value_grad_and_curvature(
        lambda p, x: x @ p["w"], loss, fisher="empirical"
    )
    curv = jax.jit(of_model)(params, x, labels)[2]
    assert curv.terms == 30
    of_loss = curvature.value_grad_and_curvature(
        lambda p, x, t: loss.value(x @ p["w"], t), loss_terms=lambda p, x, t: t.size
    )
    np.testing.assert_allclose(
        jax.jit(of_loss)(params, x, labels)[2].grams("w").g, curv.grams("w").g, rtol=1e-5, atol=1e-7
    )


def test_auxiliary_results_of_the_model():
    params, x, _, labels, _ = setup()
    step = curvature.model_value_grad_and_curvature(
        lambda p, x: (model(p, x), x[0]), losses.softmax_cross_entropy(), has_aux=True
    )
    (_, aux), _, _ = jax.jit(step)(params, x, labels, rng=jax.random.key(0))
    np.testing.assert_array_equal(aux, x[0])


def test_arguments_are_checked():
    make, loss = curvature.model_value_grad_and_curvature, losses.softmax_cross_entropy()
    params, x, _, labels, _ = setup()
    with pytest.raises(ValueError, match="pass rng="):
        make(model, loss)(params, x, labels)
    with pytest.raises(ValueError, match="fisher must be"):
        make(model, loss, fisher="true")
    with pytest.raises(ValueError, match="num_samples"):
        make(model, loss, num_samples=0)
    with pytest.raises(ValueError, match="model_fn must return one array, got tuple"):
        make(lambda p, x: (model(p, x), x), loss)(params, x, labels, rng=jax.random.key(0))
