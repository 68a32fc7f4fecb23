"""Thousands of steps on one block: balance, decay, damping, roots of singular statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.factors import (
    gram_method,
    moving,
    star_method,
)
from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.factors.kradagrad import alternating_method
from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.factors.singd import singd_method
from kradagrad_jax.factors.sirfshampoo import sirf_method
from kradagrad_jax.linalg.structures import structure
from tests.factors.driver import (
    SHAPE,
    cosine,
    drive,
    finite,
    gradients,
    krad,
    normal,
    rows,
    shampoo,
    singd,
    sirf,
)
from tests.x64 import x64


def balanced_cases():
    for names in ("dense", "diagonal", "tril_toeplitz", "hierarchical:2,1"):
        yield f"singd {names}", singd_method(singd(names)), True
    half = singd(factor_dtypes=(jnp.bfloat16, jnp.float32))
    yield "singd bfloat16", singd_method(half), True
    yield "sirf", sirf_method(sirf()), False
    yield "sirf diagonal", sirf_method(sirf(names="diagonal")), False


@pytest.mark.parametrize(("name", "method", "layered"), list(balanced_cases()))
def test_roots_stay_in_balance(name, method, layered):
    shape = (16, 3)

    def draw(t):
        # unequal scales on the two sides, and few rows
        s = rows(t, shape, 4)
        s = Rows(s.a * jnp.linspace(0.3, 3, 16), s.g * jnp.asarray([1.0, 0.3, 0.1]))
        g = s.a.T @ s.g
        return (s if layered else g), g

    factor, _, u, bad = drive(method, draw, 10_000, shape=shape)
    assert bad == 0
    roots = (factor.k, factor.c) if layered else factor.roots
    sizes = [np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(r)))
             for r in roots]  # fmt: skip
    assert abs(np.log10(sizes[0] / sizes[1])) < 2, sizes

    def later(t):
        return draw(t + 8_000)

    _, _, v, _ = drive(method, later, 2_000, shape=shape)
    assert cosine(u[-1], v[-1]) > 0.99


@pytest.mark.parametrize("names", ["dense", "diagonal"])
@pytest.mark.parametrize("layered", [True, False])
def test_balance_changes_no_direction(monkeypatch, layered, names):
    def draw(t):
        s = rows(t, (16, 3), 4)
        s = Rows(s.a * 30, s.g * 0.01)
        g = s.a.T @ s.g
        return (s if layered else g), g

    def method():
        o = singd(names, riemannian_momentum=0.5) if layered else sirf(names=names)
        return singd_method(o) if layered else sirf_method(o)

    factor, _, u, _ = drive(method(), draw, 600, shape=(16, 3))
    monkeypatch.setattr(moving, "balanced", lambda structures, roots: tuple(roots))
    other, _, v, _ = drive(method(), draw, 600, shape=(16, 3))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (factor, other)), strict=True))
    np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(v))))


def test_balance_keeps_a_product_of_any_number_of_roots():
    s = structure("dense")
    roots = [2.0**e * jnp.eye(3) for e in (40, -3, -11, 7)]
    out = moving.balanced([s] * 4, roots)
    sizes = np.log2([float(x[0, 0]) for x in out])
    assert np.sum(sizes) == 33 and np.ptp(sizes) <= 2
    same = moving.balanced([s] * 2, [roots[1], jnp.full((3, 3), jnp.nan)])
    np.testing.assert_array_equal(same[0], roots[1])


@pytest.mark.parametrize("beta2", [0.9, 0.99])
@pytest.mark.parametrize("form", ["exact", "factored", "direct", "delayed"])
def test_a_dead_row_does_not_harm_the_others(form, beta2):
    method = star_method(krad(form=form, beta2=beta2, initial_scale="absolute"))

    def draw(t, dead=True):
        g = normal(t, (4, 4))
        g = jnp.concatenate([g[:2], jnp.zeros((1, 4)), g[2:]]) if dead else g
        return g, g

    factor, _, u, bad = drive(method, draw, 20_000, every=50)
    _, _, v, _ = drive(method, lambda t: draw(t, False), 20_000, shape=(4, 4), every=50)
    assert bad == 0
    live = u[-1][jnp.asarray([0, 1, 3, 4])]
    np.testing.assert_allclose(live, v[-1], rtol=1e-3, atol=1e-3)
    x = np.asarray(factor.statistics[0], np.float64)
    x = x @ x.T if form in ("exact", "factored") else x
    np.testing.assert_allclose(x[2, 2], 1, rtol=1e-4)  # back at its start
    assert np.linalg.eigvalsh(x)[0] > 0


@pytest.mark.parametrize("form", ["exact", "factored", "direct"])
def test_alternating_form_forgets_towards_its_start(form):
    method = alternating_method(krad(form=form, beta2=0.95))

    def draw(t):
        g = normal(t, SHAPE).at[2].set(0) * 1e-3
        return g, g

    factor, _, u, bad = drive(method, draw, 20_000, every=50)
    assert bad == 0 and np.all(np.isfinite(u)) and np.any(u[-1] != 0)
    assert factor.starts is not None
    x = np.asarray(factor.statistics[0], np.float64)
    x = x @ x.T if form != "direct" else x
    np.testing.assert_allclose(x[2, 2], factor.starts[0], rtol=1e-3)


def test_decay_is_that_of_the_inverse():
    """B <- b B + (1 - b) / l I + U U^T, to rounding (exact) or second order in 1 - b (direct)."""
    with x64():
        b, scale = 0.95, 0.5
        exact = star_method(krad(form="exact", beta2=b, initial=scale, initial_scale="absolute"))
        factor, *_ = drive(exact, gradients(dtype=jnp.float64), 30, dtype=jnp.float64)
        total = np.eye(5) / scale
        for t in range(1, 31):
            g = np.asarray(normal(t, SHAPE, dtype=jnp.float64))
            total = b * total + (1 - b) / scale * np.eye(5) + g @ g.T
        k = np.asarray(factor.statistics[0])
        np.testing.assert_allclose(k @ k.T, np.linalg.inv(total), rtol=1e-10, atol=1e-14)


def test_fast_decay_needs_the_exact_form():
    star_method(krad(form="exact", beta2=0.3))
    for method in (star_method, alternating_method):
        with pytest.raises(ValueError, match="below 1/2"):
            method(krad(beta2=0.3))


def test_statistics_without_decay_keep_no_start():
    assert star_method(krad()).init(SHAPE, jnp.float32).starts is None
    assert star_method(krad(beta2=0.9)).init(SHAPE, jnp.float32).starts is not None


@pytest.mark.parametrize("scale", ["gradient", "absolute"])
@pytest.mark.parametrize("form", ["direct", "delayed"])
def test_damping_never_stops_small_gradients(form, scale):
    start = 1e6 if scale == "absolute" else 1.0
    method = star_method(krad(form=form, damping=1e-4, initial_scale=scale, initial=start))
    factor, _, u, bad = drive(method, gradients(1e-3), 300, every=10)
    assert bad == 0 and np.all(np.isfinite(u))
    assert np.all(np.linalg.norm(u.reshape(300, -1), axis=1) > 0)
    for x in factor.statistics:
        assert np.linalg.eigvalsh(np.asarray(x, np.float64))[0] > 0


def test_scaled_damping_does_not_depend_on_the_scale_of_the_loss():
    with x64():
        method = star_method(krad(damping=1e-2))
        u, v = (
            drive(method, gradients(c, dtype=jnp.float64), 20, dtype=jnp.float64)[2]
            for c in (1.0, 1e-5)
        )
        np.testing.assert_allclose(v, u, rtol=1e-9)


@pytest.mark.parametrize("rule", ["relative", "pseudo"])
def test_tracked_roots_of_rank_deficient_statistics(rule):
    with x64():
        options = shampoo(damping=0.0, damping_rule=rule)

        def draw(t):
            basis = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(5, 2)))[0])
            g = basis @ normal(1 + t // 40, (2, 4), dtype=jnp.float64)
            return g, g

        found = [
            drive(gram_method(root=root, **options), draw, 60, every=2, dtype=jnp.float64)
            for root in ("eigh", "tracked")
        ]
        assert [x[3] for x in found] == [0, 0]
        if rule == "pseudo":
            np.testing.assert_allclose(found[1][2][:40], found[0][2][:40], rtol=1e-6, atol=1e-8)
        assert np.all(np.isfinite(found[1][2]))


@pytest.mark.parametrize("seed", range(3))
def test_near_rank_one_factors_of_size_1024_are_inverted(seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, 1024))
    a = base + 1e-4 * rng.normal(size=(64, 1024))
    s = Rows(jnp.asarray(a, jnp.float32), jnp.asarray(rng.normal(size=(64, 2)), jnp.float32))
    method = kfac_method(KfacOptions(damping=1e-12))
    step = Step(*(jnp.asarray(x, jnp.int32) for x in (1, 1, 1, 0)))
    factor = jax.jit(method.accumulate)(method.init((1024, 2), jnp.float32), s, step)
    factor = jax.jit(method.refresh)(factor, step)
    assert finite(factor)
    assert np.linalg.eigvalsh(np.asarray(factor.inverses[0], np.float64))[0] > 0
