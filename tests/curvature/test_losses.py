"""Losses: values, gradients, Hessians and the labels drawn from the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kradagrad_jax.curvature import losses
from tests.x64 import x64


def logistic(z, t):
    return jnp.sum(jax.nn.softplus(z)) - jnp.sum(z * t) + 0.1 * jnp.sum(z) ** 2


LOSSES = {
    "softmax": losses.softmax_cross_entropy(),
    "sigmoid": losses.sigmoid_binary_cross_entropy(),
    "sigmoid-per-output": losses.sigmoid_binary_cross_entropy(event_dims=0),
    "squared": losses.squared_error(),
    "squared-images": losses.squared_error(0.7, event_dims=2),
    "generic": losses.generic(logistic),
}
each = pytest.mark.parametrize("name", LOSSES)
LIKELIHOODS = [name for name in LOSSES if name != "generic"]


@pytest.fixture(autouse=True)
def double():
    with x64(), jax.numpy_dtype_promotion("strict"):
        yield


def outputs(name, batch=(3,), seed=0):
    event = (2, 2) if name == "squared-images" else (4,)
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*batch, *event)))


def targets_of(name, z, seed=1):
    rng = np.random.default_rng(seed)
    if name == "softmax":
        return jnp.asarray(rng.integers(0, z.shape[-1], z.shape[:-1]))
    if name.startswith("squared"):
        return jnp.asarray(rng.normal(size=z.shape))
    return jnp.asarray(rng.integers(0, 2, z.shape).astype(float))


def weights_of(loss, z):
    return jnp.asarray(
        np.random.default_rng(2).uniform(0.2, 2, z.shape[: z.ndim - loss.event_dims])
    )


def hessians(loss, z, targets):
    """Dense Hessians ``(terms, C, C)`` of the single terms, by autodiff of the sum."""
    n = int(np.prod(z.shape[: z.ndim - loss.event_dims]))
    full = jax.jit(jax.hessian(lambda x: jnp.sum(loss.per_term(x, targets))))(z)
    full = full.reshape(z.size, z.size)
    blocks = full.reshape(n, z.size // n, n, z.size // n)
    return np.stack([np.asarray(blocks[i, :, i]) for i in range(n)])


@each
def test_columns_are_a_square_root_of_the_hessian(name):
    loss, z = LOSSES[name], outputs(name, (2, 3))
    targets, weights = targets_of(name, z), weights_of(LOSSES[name], z)
    columns = loss.sqrt_columns(z, targets, weights)
    assert columns.shape[1:] == z.shape
    c = np.asarray(columns).reshape(len(columns), weights.size, -1)
    products = np.einsum("cni,cnj->nij", c, c)
    expected = hessians(loss, z, targets) * np.asarray(weights).reshape(-1, 1, 1)
    np.testing.assert_allclose(products, expected, atol=1e-12)


@each
def test_the_gradient_of_the_value_is_the_weighted_mean_of_residuals(name):
    loss, z = LOSSES[name], outputs(name, (2, 3))
    targets, w = targets_of(name, z), weights_of(LOSSES[name], z)
    spread = w.reshape(w.shape + (1,) * loss.event_dims)
    for weights, scale in ((None, 1 / w.size), (w, spread / jnp.sum(w))):
        gradient = jax.grad(loss.value)(z, targets, weights)
        np.testing.assert_allclose(gradient, loss.residual(z, targets) * scale, atol=1e-15)


@each
@pytest.mark.parametrize("kind", ["pseudo_gradient", "rademacher_gradient"])
def test_the_mean_of_outer_products_tends_to_the_hessian(name, kind):
    loss, z = LOSSES[name], outputs(name, (2,))
    targets, weights, draws = targets_of(name, z), weights_of(LOSSES[name], z), 20_000
    keys = jax.random.split(jax.random.key(3), draws)
    s = jax.jit(jax.vmap(lambda k: getattr(loss, kind)(k, z, targets, weights)))(keys)
    s = np.asarray(s).reshape(draws, weights.size, -1)
    expected = hessians(loss, z, targets) * np.asarray(weights).reshape(-1, 1, 1)
    error = np.abs(np.einsum("dni,dnj->nij", s, s) / draws - expected).max()
    assert error < 0.05 * np.abs(expected).max()
    assert np.abs(s.mean(0)).max() < 0.03 * np.sqrt(np.abs(expected).max())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_pseudo_gradients_are_residuals_at_drawn_targets(name):
    loss, z, key = LOSSES[name], outputs(name), jax.random.key(4)
    drawn = loss.sample(key, z)
    s = loss.pseudo_gradient(key, z)
    np.testing.assert_allclose(s, loss.residual(z, drawn), atol=1e-14)
    np.testing.assert_array_equal(s, loss.pseudo_gradient(key, z))
    assert np.abs(s - loss.pseudo_gradient(jax.random.key(5), z)).max() > 0


def test_values_are_those_of_optax():
    z = outputs("softmax", (2, 3))
    labels, bits = targets_of("softmax", z), targets_of("sigmoid", z)
    softmax, sigmoid = LOSSES["softmax"], LOSSES["sigmoid"]
    expected = optax.softmax_cross_entropy_with_integer_labels(z, labels)
    np.testing.assert_allclose(softmax.value(z, labels), expected.mean())
    one_hot = jax.nn.one_hot(labels, 4, dtype=z.dtype)
    np.testing.assert_allclose(softmax.value(z, one_hot), expected.mean())
    expected = optax.sigmoid_binary_cross_entropy(z, bits)
    np.testing.assert_allclose(sigmoid.value(z, bits), expected.sum(-1).mean())
    np.testing.assert_allclose(LOSSES["sigmoid-per-output"].value(z, bits), expected.mean())
    np.testing.assert_allclose(losses.squared_error(2 / 4).value(z, bits), ((z - bits) ** 2).mean())


@each
def test_masked_terms_count_for_nothing(name):
    loss, z = LOSSES[name], outputs(name, (5,))
    targets, mask = targets_of(name, z), jnp.array([1, 0, 1, 1, 0])
    batch = mask if loss.event_dims else jnp.broadcast_to(mask[:, None], z.shape)
    kept = np.asarray(mask) == 1
    np.testing.assert_allclose(
        loss.value(z, targets, batch), loss.value(z[kept], targets[kept]), rtol=1e-14
    )
    assert loss.terms(z, batch) == loss.terms(z[kept])
    s = loss.pseudo_gradient(jax.random.key(0), z, targets, batch)
    assert not np.asarray(s)[~kept].any()
    assert loss.value(z, targets, 0 * batch) == 0


@each
def test_half_precision_outputs(name):
    """Arithmetic in float32; vectors in the dtype of the outputs, as cotangents must be."""
    loss, z = LOSSES[name], outputs(name).astype(jnp.bfloat16)
    targets = targets_of(name, z)
    targets = targets if name == "softmax" else targets.astype(jnp.float32)
    assert loss.value(z, targets).dtype == jnp.float32
    for s in (
        loss.pseudo_gradient(jax.random.key(0), z, targets),
        loss.residual(z, targets),
        loss.sqrt_columns(z, targets),
    ):
        assert s.dtype == jnp.bfloat16


def test_extreme_logits_stay_finite():
    z = jnp.asarray([[800.0, -800.0, 0.0]])
    for loss in (LOSSES["softmax"], LOSSES["sigmoid"]):
        s = loss.pseudo_gradient(jax.random.key(0), z)
        assert jnp.isfinite(s).all()
        assert jnp.isfinite(loss.sqrt_columns(z)).all()
    assert LOSSES["softmax"].value(z, jnp.array([0])) == 0
    assert LOSSES["sigmoid"].value(z, jnp.array([[1.0, 0.0, 0.0]])) == pytest.approx(np.log(2))


def test_losses_are_static_arguments():
    @functools.partial(jax.jit, static_argnums=0)
    def terms(loss, z):
        return loss.terms(z)

    z = outputs("softmax")
    assert terms(losses.softmax_cross_entropy(), z) == 3
    assert losses.squared_error(2.0) == losses.squared_error(2.0)
    assert hash(losses.generic(logistic)) == hash(LOSSES["generic"])


def test_draws_are_constants():
    """No derivative flows through the drawn labels."""
    z = outputs("squared")
    key = jax.random.key(0)
    gradient = jax.grad(lambda x: jnp.sum(x * LOSSES["squared"].sample(key, x)))(z)
    np.testing.assert_array_equal(gradient, LOSSES["squared"].sample(key, z))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LOSSES["sigmoid"].value(jnp.ones(3), jnp.ones(3)), "event_dims=0"),
        (lambda: LOSSES["squared"].value(jnp.ones((3, 2)), jnp.ones(3)), "targets of shape"),
        (lambda: LOSSES["softmax"].value(jnp.ones((3, 2)), jnp.ones((3, 1), int)), "labels have"),
        (lambda: LOSSES["softmax"].value(jnp.ones((3, 2), int), jnp.ones(3, int)), "real outputs"),
        (lambda: LOSSES["softmax"].terms(jnp.ones((3, 2)), jnp.ones(2)), "weights have shape"),
        (lambda: LOSSES["generic"].sqrt_columns(jnp.ones((3, 2))), "pass them"),
        (
            lambda: LOSSES["generic"].sqrt_columns(jnp.ones((3, 65)), jnp.ones((3, 65))),
            "max_outputs",
        ),
        (lambda: losses.squared_error(0.0), "c > 0"),
    ],
)
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_generic_loss_has_no_labels_to_draw():
    with pytest.raises(NotImplementedError, match="pseudo_gradient"):
        LOSSES["generic"].sample(jax.random.key(0), jnp.ones((3, 2)))
