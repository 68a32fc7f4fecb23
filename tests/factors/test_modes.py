"""Modes without a factor, and exponents per mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors import (
    SquareRoot,
    array_method,
    gram_method,
    star_method,
)
from kradagrad_jax.factors.kradagrad import alternating_method
from kradagrad_jax.factors.method import Step
from kradagrad_jax.factors.sirfshampoo import sirf_method
from kradagrad_jax.factors.tnt import TntOptions, tnt_method
from tests.factors.driver import SHAPE, drive, gradients, krad, normal, shampoo, sirf
from tests.x64 import x64


def partial_methods():
    for root in ("eigh", "tracked"):
        yield f"gram {root}", gram_method(root=root, **shampoo(exponent=0.5))
    yield "array", array_method(SquareRoot(2), **shampoo(exponent=0.5))
    for form in ("direct", "factored", "exact", "delayed"):
        yield form, star_method(krad(form=form, exponent=0.5, beta2=0.9))
    yield "alternating", alternating_method(krad())


@pytest.mark.parametrize(("name", "method"), list(partial_methods()))
@pytest.mark.parametrize("mode", [0, 1])
def test_one_sided_is_two_sided_with_the_identity(name, method, mode):
    """All modes but one are left alone; their entries in the factor are None."""
    assert method.partial
    has = tuple(i == mode for i in range(2))
    one_sided = method._replace(init=lambda shape, dtype: method.init(shape, dtype, has))
    factor, step, u, bad = drive(one_sided, gradients(), 7)
    assert bad == 0
    assert factor.statistics[1 - mode] is None and factor.preconditioners[1 - mode] is None
    g = gradients()(7)[1]
    if name != "alternating":  # whose statistics depend on the other mode
        both, *_ = drive(method, gradients(), 7)
        for a, b in zip(*(jax.tree.leaves(f.preconditioners[mode]) for f in (factor, both)),
                        strict=True):  # fmt: skip
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(u[-1], method.precondition(factor, g, step), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(u[-1] - g)).max() > 1e-2


def test_one_sided_sirfshampoo_and_tnt():
    with x64():
        has = (True, False)
        method = sirf_method(sirf())
        part = method._replace(init=lambda shape, dtype: method.init(shape, dtype, has))
        draw = gradients(dtype=jnp.float64)
        factor, *_ = drive(part, draw, 5, dtype=jnp.float64)
        assert factor.roots[1] is None
        root = np.eye(5)
        for t in range(1, 6):
            y = root.T @ np.asarray(draw(t)[0])
            m = 0.5 * (y @ y.T * 5 / 20 + 1e-4 * root.T @ root - np.eye(5))
            root = root @ (np.eye(5) - 0.6 / max(1, np.linalg.norm(m)) * m)
        np.testing.assert_allclose(factor.roots[0], root, rtol=1e-10, atol=1e-12)

        # an isotropic mode: c / (c + damping) of what the factor alone would do
        method = tnt_method(TntOptions(damping=0.1))
        step = Step(*(jnp.asarray(x, jnp.int32) for x in (1, 1, 1, 0)))
        s, g = normal(1, (3, 5, 4), dtype=jnp.float64), normal(2, SHAPE, dtype=jnp.float64)
        factor = method.accumulate(method.init(SHAPE, jnp.float64, has), s, step)
        u = method.precondition(method.refresh(factor, step), g, step)
        gram = np.einsum("nij,nkj->ik", s, s) / 3 / 4
        c = np.sqrt(np.trace(gram) / 5)
        left = gram * c * 5 / np.trace(gram)
        np.testing.assert_allclose(
            u, np.linalg.solve(left + 0.1 * np.eye(5), g) / (c + 0.1), rtol=1e-10
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda e: gram_method(root="eigh", **shampoo(exponent=e)),
        lambda e: array_method(SquareRoot(), **shampoo(exponent=e)),
        lambda e: star_method(krad(exponent=e)),
    ],
)
def test_a_tuple_of_exponents_is_the_scalar_option(make):
    forms = [None, 0.25, (0.25, 0.25), (None, 0.25), {2: (0.25, 0.25)}, {3: 1.0}]
    found = [drive(make(e), gradients(), 5)[2] for e in forms]
    for u in found[1:]:
        np.testing.assert_array_equal(u, found[0])
    with pytest.raises(ValueError, match="names 3 modes, a block has 2"):
        make((0.1, 0.2, 0.3)).init(SHAPE, jnp.float32)


def test_a_mode_of_exponent_zero_has_no_factor():
    method = gram_method(root="eigh", **shampoo(exponent=(0.5, 0)))
    factor = method.init(SHAPE, jnp.float32)
    assert [x is None for x in factor.statistics] == [False, True]


def test_transposing_the_gradient_and_the_exponents_transposes_the_direction():
    with x64():

        def turned(t):
            g = gradients(dtype=jnp.float64)(t)[0].T
            return g, g

        for exponent in ((0.5, 0.25), (0.5, 0)):
            a = gram_method(root="eigh", **shampoo(exponent=exponent))
            b = gram_method(root="eigh", **shampoo(exponent=exponent[::-1]))
            u = drive(a, gradients(dtype=jnp.float64), 6, dtype=jnp.float64)[2]
            v = drive(b, turned, 6, shape=SHAPE[::-1], dtype=jnp.float64)[2]
            np.testing.assert_allclose(np.swapaxes(v, 1, 2), u, rtol=1e-9, atol=1e-12)
