"""Block methods against closed forms and against each other (float64 unless said)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax.factors import KradOptions, SquareRoot, array_method, gram_method, star_method
from kradagrad_jax.factors.roots import make_root
from tests.x64 import x64


def drive(method, grads, refresh_at=None):
    factor = method.init(grads[0].shape, grads[0].dtype)
    accumulate, refresh = jax.jit(method.accumulate), jax.jit(method.refresh)
    for t, g in enumerate(grads, 1):
        step = step_at(t)
        factor = accumulate(factor, g, step)
        if refresh_at is None or t in refresh_at:
            factor = refresh(factor, step)
    return factor


def step_at(t, refreshes=None):
    """Step t of a block that takes a statistic and is refreshed at every step."""
    count = jnp.asarray(t, jnp.int32)
    return kj.Step(count, 1, count, count - 1 if refreshes is None else jnp.asarray(refreshes))


def gradients(n, shape=(5, 4), seed=0):
    return list(np.random.default_rng(seed).standard_normal((n, *shape)))


def shampoo(**kw):
    base = {
        "beta2": 1.0, "damping": 0.0, "damping_rule": "none", "initial": 1e-3,
        "exponent": None, "bias_correction": False,
    }  # fmt: skip
    return base | kw


def krad(**kw):
    base = {
        "form": "direct", "bound": "sym", "initial": 1.0, "initial_scale": "absolute",
        "damping": 0.0, "beta2": 1.0, "exponent": None, "root": "eigh", "root_damping": 0.0,
    }  # fmt: skip
    return KradOptions(**(base | kw))


@pytest.mark.parametrize("beta2", [1.0, 0.9])
@pytest.mark.parametrize("fold_every", [1, 3, 4])
def test_array_form_equals_gram_form(beta2, fold_every):
    with x64():
        grads = [jnp.asarray(g) for g in gradients(8)]
        options = shampoo(beta2=beta2, bias_correction=beta2 < 1)
        a = drive(gram_method(root="eigh", **options), grads)
        b = drive(array_method(SquareRoot(fold_every), **options), grads)
        for p, q in zip(a.preconditioners, b.preconditioners, strict=True):
            np.testing.assert_allclose(p, q @ q.T, rtol=1e-9, atol=1e-12)
        if fold_every == 1:
            for s, r in zip(a.statistics, b.statistics, strict=True):
                np.testing.assert_allclose(s, r.T @ r, rtol=1e-12, atol=1e-14)


def test_array_form_in_float32_where_gram_fails():
    """cond(S) = 1e10: the array form stays within 1e-3 of float64, the Gram form does not."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    g = q * np.logspace(0, -5, 24) @ np.linalg.qr(rng.standard_normal((24, 24)))[0]
    w, v = np.linalg.eigh(g @ g.T + 1e-14 * np.eye(24))
    exact = (v * w**-0.25) @ v.T @ g
    errors = {}
    for name, method in {
        "array": array_method(SquareRoot(), **shampoo(initial=1e-14)),
        "gram": gram_method(root="eigh", **shampoo(initial=1e-14)),
    }.items():
        factor = drive(method, [jnp.asarray(g, jnp.float32)])
        p = np.asarray(factor.preconditioners[0], np.float64)
        u = (p @ p.T if name == "array" else p) @ g
        errors[name] = np.linalg.norm(u - exact) / np.linalg.norm(exact)
    assert errors["array"] < 1e-3
    assert errors["gram"] > 10 * errors["array"]


@pytest.mark.parametrize("root", ["newton", "tracked"])
def test_other_roots_agree_with_eigh(root):
    with x64():
        grads = [jnp.asarray(g) for g in gradients(12)]
        options = shampoo(damping=1e-6, damping_rule="relative", initial=0.0, beta2=0.9)
        reference = drive(gram_method(root="eigh", **options), grads)
        method = gram_method(root=root, **options)
        factor = method.init(grads[0].shape, grads[0].dtype)
        accumulate, refresh = jax.jit(method.accumulate), jax.jit(method.refresh)
        for t, g in enumerate(grads, 1):
            step = step_at(t)
            factor = accumulate(factor, g, step)
            for repeat in range(6 if root == "tracked" else 1):
                factor = refresh(factor, step_at(t, t - 1 + repeat))
        g = grads[-1]
        a, b = reference, factor
        u, v = (m.precondition(f, g, step) for m, f in (
            (gram_method(root="eigh", **options), a), (method, b)))  # fmt: skip
        np.testing.assert_allclose(u, v, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("exponent", [-0.25, 0.25])
def test_a_newton_root_that_fails_leaves_the_last_one(exponent):
    """Rounding can make an inverse statistic indefinite; the iteration then diverges."""
    root = make_root("newton", 1e-6, "relative")
    old = jnp.eye(3) * 7
    compute = jax.jit(lambda s: root.compute(s, old, exponent, False))
    good, bad = jnp.diag(jnp.asarray([4.0, 2.0, 1.0])), jnp.diag(jnp.asarray([4.0, 2.0, -1.0]))
    np.testing.assert_allclose(
        jnp.diagonal(compute(good)), jnp.diagonal(good) ** exponent, rtol=1e-4
    )
    np.testing.assert_array_equal(compute(bad), old)
    np.testing.assert_array_equal(compute(bad * jnp.nan), old)


def test_exact_form_is_the_inverse():
    with x64():
        grads = [jnp.asarray(g) for g in gradients(20)]
        factor = drive(star_method(krad(form="exact", initial=10.0)), grads)
        inverse = np.linalg.inv(np.eye(5) / 10 + sum(g @ g.T for g in gradients(20)))
        k = np.asarray(factor.statistics[0])
        np.testing.assert_allclose(k @ k.T, inverse, rtol=1e-11, atol=1e-14)
        w, v = np.linalg.eigh(inverse)
        np.testing.assert_allclose(factor.preconditioners[0], (v * w**0.25) @ v.T, rtol=1e-10)


def test_delayed_form_with_interval_one_is_the_direct_form_with_trace():
    with x64():
        grads = [jnp.asarray(g) for g in gradients(10)]
        a = drive(star_method(krad(bound="trace")), grads)
        b = drive(star_method(krad(form="delayed")), grads)
        for x, y in zip(a.statistics + a.preconditioners, b.statistics + b.preconditioners,
                        strict=True):  # fmt: skip
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)
        assert all(np.all(p == 0) for p in b.pending)


@pytest.mark.parametrize("form", ["direct", "factored", "exact", "delayed"])
def test_gradient_scaled_start_is_independent_of_the_scale_of_the_loss(form):
    with x64():
        grads = gradients(6)
        options = krad(form=form, bound="sym", initial_scale="gradient")
        factors = [
            drive(star_method(options), [jnp.asarray(c * g) for g in grads]) for c in (1.0, 1e-4)
        ]
        a, b = (f.preconditioners for f in factors)
        for p, q in zip(a, b, strict=True):
            np.testing.assert_allclose(q, 1e4**0.5 * np.asarray(p), rtol=1e-9, atol=1e-9)


def test_forms_without_damping_refuse_it():
    with pytest.raises(ValueError, match="damping"):
        kj.kradagrad_star(1e-3, form="factored", damping=1e-3)
    with pytest.raises(ValueError, match="root"):
        kj.kradagrad_star(1e-3, form="exact", root="newton")
