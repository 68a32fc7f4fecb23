"""What the specification of SIRFShampoo says holds, in float64 on one tensor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.factors.sirfshampoo import SirfOptions, sirf_method
from kradagrad_jax.linalg.structures import structure

MIXED = ("hierarchical:1,1", "tril_toeplitz", "diagonal")


@functools.lru_cache
def method(names="dense", **others):
    """`names`: one for all axes, or one per axis."""

    def structures(dims):
        each = (names,) * len(dims) if isinstance(names, str) else names
        return tuple(structure(n) for n in each)

    others = {"damping": 0.1, "lr_cov": 0.2, "riemannian_momentum": 0.5} | others
    return sirf_method(SirfOptions(structures, lambda order: (None,) * order, **others))


def at(t):
    count = jnp.asarray(t, jnp.int32) + 1
    return Step(count, 1, count, count - 1)


@functools.partial(jax.jit, static_argnums=0)
def run(m, gradients):
    """Factors after every gradient of a stack; statistics have the batch size in them."""

    def step(factor, now):
        factor = m.accumulate(factor, now[1], at(now[0]))
        return factor, factor

    first = m.init(gradients.shape[1:], jnp.float64)
    return jax.lax.scan(step, first, (jnp.arange(len(gradients)), gradients))[1]


def last(factors):
    return jax.tree.map(lambda x: x[-1], factors)


def gradients(*shape, steps=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(steps, *shape)))


def test_one_example_is_ingd():
    """A rank-one gradient a g^T, no momentum, clamp inactive: dense INGD of the rows a and g."""
    rng = np.random.default_rng(0)
    a, g = (jnp.asarray(rng.normal(size=(5, d))) for d in (4, 3))
    options = {"damping": 0.1, "lr_cov": 1e-3, "riemannian_momentum": 0.0}
    ingd = singd_method(SingdOptions(**options))
    sirf = method(**options)
    mine, theirs = sirf.init((4, 3), jnp.float64), ingd.init((4, 3), jnp.float64)
    for t in range(5):
        # scaled so that the norm of m stays below one
        x, y = 0.3 * a[t], 0.3 * g[t]
        mine = sirf.accumulate(mine, x[:, None] * y[None, :], at(t))
        theirs = ingd.accumulate(theirs, Rows(x[None], y[None]), at(t))
    np.testing.assert_allclose(mine.roots[0], theirs.k, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(mine.roots[1], theirs.c, rtol=1e-13, atol=1e-15)


def test_the_momenta_have_equal_means():
    factors = run(method(MIXED), gradients(4, 3, 2))
    kinds = [structure(n) for n in MIXED]
    means = [jax.vmap(s.average)(m) for s, m in zip(kinds, factors.momenta, strict=True)]
    for other in means[1:]:
        np.testing.assert_allclose(other, means[0], rtol=1e-12, atol=1e-15)


def test_permuted_axes_permute_the_factors():
    g = gradients(4, 3, 2)
    one = last(run(method(), g)).roots
    other = last(run(method(), jnp.transpose(g, (0, 3, 1, 2)))).roots
    for i, j in enumerate((2, 0, 1)):
        np.testing.assert_allclose(other[i], one[j], rtol=1e-12, atol=1e-14)


def test_axes_of_length_one_do_not_matter():
    g = gradients(4, 3)
    one = run(method(), g)
    other = run(method(), g[:, None, :, None, :])
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(method().init((1, 1), jnp.float64).roots) == 1


def test_rotations_of_dense_factors():
    rng, g = np.random.default_rng(1), gradients(4, 3)
    q, p = (np.linalg.qr(rng.normal(size=(d, d)))[0] for d in (4, 3))
    m = method()
    u = m.precondition(last(run(m, g)), g[0], at(0))
    v = m.precondition(last(run(m, q @ g @ p.T)), q @ g[0] @ p.T, at(0))
    np.testing.assert_allclose(v, q @ u @ p.T, rtol=0, atol=1e-13 * float(jnp.abs(u).max()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_factors_stay_invertible_at_any_scale(scale):
    b, m = 0.7, method(lr_cov=0.7)
    before = [np.eye(5), np.eye(4)]
    for t in range(12):
        now = run(m, scale * gradients(5, 4, steps=12))
        for i in (0, 1):
            new = np.asarray(now.roots[i][t])
            old = np.linalg.svd(before[i], compute_uv=False)
            values = np.linalg.svd(new, compute_uv=False)
            assert values[-1] >= (1 - b) * old[-1] * (1 - 1e-12)
            assert values[0] <= (1 + b) * old[0] * (1 + 1e-12)
            before[i] = new


@pytest.mark.parametrize("names", ["dense", ("tril", "hierarchical:1,1"), "diagonal"])
def test_fixed_point_of_a_constant_gradient(names):
    g = gradients(4, 3, steps=1)
    m = method(names, lr_cov=0.5, riemannian_momentum=0.0)
    factor = last(run(m, jnp.broadcast_to(g, (1500, 4, 3))))
    each = (names,) * 2 if isinstance(names, str) else names
    kinds = [structure(n) for n in each]
    k, c = (np.asarray(s.to_dense(x)) for s, x in zip(kinds, factor.roots, strict=True))
    y = k.T @ np.asarray(g[0]) @ c
    for s, root, other, rows, d in ((kinds[0], k, c, y, 4), (kinds[1], c, k, y.T, 3)):
        tau = np.trace(other.T @ other) / len(other)
        whole = d / 12 * rows @ rows.T + 0.1 * tau * root.T @ root
        projected = s.to_dense(s.project_dense(jnp.asarray(whole)))
        np.testing.assert_allclose(projected, np.eye(d), rtol=0, atol=1e-12)
    trace = np.sum(y * y) + 0.1 * np.trace(k.T @ k) * np.trace(c.T @ c)
    assert abs(trace / 12 - 1) < 1e-12


def test_a_vector_follows_the_inverse_of_its_averaged_outer_product():
    """One axis, no momentum: K K^T is the inverse of the moving average up to O(b^2)."""
    errors = []
    for b in (0.1, 0.05, 0.025):
        g = 0.3 * gradients(3, steps=10)
        k = np.asarray(last(run(method(lr_cov=b, riemannian_momentum=0.0), g)).roots[0])
        s = 0.9 * np.eye(3)
        for x in np.asarray(g):
            s = (1 - b) * s + b * np.outer(x, x)
        errors.append(np.linalg.norm(k @ k.T - np.linalg.inv(s + 0.1 * np.eye(3))) / b**2)
    assert max(errors) < 2 * min(errors)


def test_positive_and_zero_gradients():
    g, m = gradients(4, 3, 2), method(MIXED)
    factor = last(run(m, g))
    assert float(jnp.sum(g[0] * m.precondition(factor, g[0], at(0)))) > 0
    none = jnp.zeros((1, 4, 3, 2))
    drifted = last(run(m, none))
    assert not m.precondition(drifted, none[0], at(0)).any()
    assert float(drifted.roots[2][0]) > 1  # towards 1 / sqrt of the damping


def test_no_momentum_no_memory():
    assert method(riemannian_momentum=0.0).init((4, 3), jnp.float64).momenta is None
    assert len(method().init((4, 3), jnp.float64).momenta) == 2


def test_flattened_tensors_have_one_factor():
    m = method("diagonal", flatten=True)
    factor = last(run(m, gradients(4, 3)))
    assert factor.roots[0].shape == (12,)
    assert m.precondition(factor, gradients(4, 3)[0], at(0)).shape == (4, 3)
