import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import linalg
from tests.linalg.matrices import primitives


def tensor(shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_mode_grams_are_those_of_the_unfoldings(double, shape):
    g = tensor(shape)
    for mode in range(len(shape)):
        unfolded = np.moveaxis(g, mode, 0).reshape(shape[mode], -1)
        np.testing.assert_array_equal(linalg.unfold(jnp.asarray(g), mode), unfolded)
        gram = linalg.mode_gram(jnp.asarray(g), mode)
        np.testing.assert_allclose(gram, unfolded @ unfolded.T, rtol=1e-13, atol=1e-13)
        np.testing.assert_array_equal(gram, linalg.mode_gram(jnp.asarray(g), mode - len(shape)))


def test_mode_gram_of_a_matrix_moves_no_data():
    program = jax.make_jaxpr(lambda g: (linalg.mode_gram(g, 0), linalg.mode_gram(g, 1)))
    assert primitives(program(jnp.ones((3, 4)))) == {"dot_general"}


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_multiply_modes_is_the_kronecker_product(double, shape):
    rng = np.random.default_rng(1)
    g, matrices = tensor(shape), [rng.normal(size=(n + 1, n)) for n in shape]
    kron = np.ones((1, 1))
    for matrix in matrices:
        kron = np.kron(kron, matrix)
    result = linalg.multiply_modes(jnp.asarray(g), [jnp.asarray(m) for m in matrices])
    expected = (kron @ g.reshape(-1)).reshape([n + 1 for n in shape])
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_multiply_modes_leaves_skipped_modes_alone(double):
    g = jnp.asarray(tensor((3, 4, 2)))
    matrices = [2.0 * jnp.eye(3), None, 5.0 * jnp.eye(2)]
    np.testing.assert_allclose(linalg.multiply_modes(g, matrices), 10.0 * g)
    np.testing.assert_allclose(linalg.multiply_modes(g, matrices, skip=(0,)), 5.0 * g)


def test_multiply_modes_wants_one_matrix_per_mode():
    with pytest.raises(ValueError, match="one matrix per mode"):
        linalg.multiply_modes(jnp.ones((3, 4)), [jnp.eye(3)])


def test_products_ask_for_full_precision():
    def program(a):
        return linalg.matmul(a, a), linalg.mode_gram(a, 0), linalg.multiply_modes(a, [a, a])

    text = jax.jit(program).lower(jnp.ones((3, 3))).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 4
    assert all(line.count("HIGHEST") == 2 for line in dots)


def test_symmetrize_takes_stacks():
    a = jnp.arange(18.0).reshape(2, 3, 3)
    np.testing.assert_array_equal(linalg.symmetrize(a)[1], (a[1] + a[1].T) / 2)
