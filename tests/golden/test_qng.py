"""QNG against the matrix that it stands for, and against its recursion in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.curvature.samples import Samples
from tests.golden.qng import QngOptions, qng, qng_method
from tests.x64 import x64

SIZE, STEPS, A, B1 = 7, 5, 0.9, 0.8


def draws():
    rng = np.random.default_rng(0)
    return rng.normal(size=(STEPS, SIZE)), rng.normal(size=(STEPS, SIZE))


def directions(options):
    """Direction of every step, and the sum of gradients it belongs to."""
    grads, vectors = draws()
    tx, out, total = qng(options, B1), [], 0
    state, update = tx.init({"w": jnp.zeros(SIZE)}), jax.jit(tx.update)
    for g, h in zip(grads, vectors, strict=True):
        samples = Samples.from_gradients({"w": jnp.asarray(h)})
        u, state = update({"w": jnp.asarray(g)}, state, curvature=samples)
        total = B1 * total + g
        out.append((np.asarray(u["w"]), total))
    return out


def test_product_form_is_the_inverse():
    """(a^t I + sum (1-a) a^(t-i) h h^T)^-1 with the curvature before this step."""
    with x64():
        found = directions(QngOptions(A, STEPS))
    matrix = np.eye(SIZE)
    for (u, total), h in zip(found, draws()[1], strict=True):
        np.testing.assert_allclose(u, np.linalg.solve(matrix, total), rtol=1e-10)
        matrix = A * matrix + (1 - A) * np.outer(h, h)


def test_additive_form_differs_from_the_third_step_on():
    with x64():
        product, additive = (directions(QngOptions(A, STEPS, f)) for f in ("product", "additive"))
    for t, ((a, _), (b, _)) in enumerate(zip(product, additive, strict=True)):
        assert np.allclose(a, b, rtol=1e-10) == (t < 2), t


def test_trust_region():
    """lr^2 <sum of gradients, direction> / 2 is at most the bound, and the bound where it binds."""
    rate, trust = 0.5, 0.3
    with x64():
        free = directions(QngOptions(A, STEPS))
        bounded = directions(QngOptions(A, STEPS, "product", trust, rate))
    for (u, total), (v, _) in zip(free, bounded, strict=True):
        factor = min(1.0, np.sqrt(2 * trust / (total @ u)) / rate)
        np.testing.assert_allclose(v, factor * u, rtol=1e-10)
        assert factor < 1 or np.allclose(u, v)
    assert any(total @ u * rate**2 > 2 * trust for u, total in free)


def test_a_step_without_a_vector_uses_all_there_are():
    tx = qng(QngOptions(A, STEPS), B1)
    grads, vectors = draws()
    state = tx.init({"w": jnp.zeros(SIZE)})
    zero = {"w": jnp.zeros(SIZE)}
    samples = Samples.from_gradients({"w": jnp.asarray(vectors[0], jnp.float32)})
    _, state = tx.update(zero, state, curvature=samples)
    u, _ = tx.update({"w": jnp.asarray(grads[0], jnp.float32)}, state, curvature=None)
    matrix = A * np.eye(SIZE) + (1 - A) * np.outer(vectors[0], vectors[0])
    np.testing.assert_allclose(u["w"], np.linalg.solve(matrix, grads[0]), rtol=1e-4)


def test_misuse():
    with pytest.raises(ValueError, match="form"):
        qng_method(QngOptions(form="other"))
    with pytest.raises(ValueError, match="learning_rate"):
        qng_method(QngOptions(trust=1.0))
    with pytest.raises(ValueError, match="one curvature vector"):
        tx = qng(QngOptions(), 0.9)
        two = Samples.from_gradients({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}), curvature=two)
    with pytest.raises(ValueError, match="vectors"):
        qng_method(QngOptions()).init((2, 3), jnp.float32)
