"""Parameters and gradients in half precision, and factors stored in it, for every alias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax.transforms.rounding import stochastic_round
from tests.registry import all_finite
from tests.scale import zoo
from tests.scale.zoo import over_all, over_families

HALF = {"dense0": jnp.float16, "dense1": jnp.bfloat16, "scale": jnp.float16}
# who stores factors in half precision: those whose factors are products of themselves only, and
# Ginger, which makes its basis orthonormal again before it rounds it
STORES = {"sirfshampoo", "ikfac", "ingd", "singd"}


def half(tree):
    """Both formats in one tree: one compilation serves both."""
    return {k: jax.tree.map(lambda x, d=d: x.astype(d), tree[k]) for k, d in HALF.items()}


def names(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree) if x.dtype.kind != "i"}


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype.name, tree)


@functools.cache
def shared_update(case):
    """The update of half-precision trees, compiled once."""
    return jax.jit(case.make().update, compiler_options=zoo.QUICK)


@over_families
def test_half_precision(case):
    """Both formats: dtypes, the numbers of float32 up to rounding, and a loss that falls."""
    p, update = half(zoo.params()), shared_update(case)
    state = case.make().init(p)
    engine = zoo.engine_state(state)
    assert names((engine.factors, engine.mu, engine.nu, engine.fallback)) == {"float32"}
    before, kinds, start = dtypes(state), dtypes(p), float(zoo.loss(p))
    for t in range(40):
        _, grads, extra = case.measure(p, t)
        assert dtypes(grads) == kinds
        updates, state = update(grads, state, p, **extra)
        assert dtypes(updates) == kinds and dtypes(state) == before
        if t == 0:
            wide, wide_p = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (grads, p))
            expected, _ = case.tx.update(wide, case.tx.init(wide_p), wide_p, **extra)
            for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
                np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2, atol=1e-5)
        p = optax.apply_updates(p, updates)
        assert dtypes(p) == kinds
    assert all_finite((p, state))
    assert float(zoo.loss(p)) < 0.85 * start
    assert zoo.counters(state) == dict(zip(zoo.COUNTERS, (40, 40, 0, 0), strict=True))


@over_all
def test_who_stores_factors_in_half_precision(case):
    """Those that factorise say so, with the remedy."""
    if case.name not in STORES:
        with pytest.raises(ValueError, match=r"factor_dtype must be float32 or float64.*lower"):
            case.make(factor_dtype=jnp.bfloat16).init(zoo.params())
        return
    state = jax.eval_shape(case.make(factor_dtype=jnp.bfloat16).init, zoo.params())
    assert names(zoo.engine_state(state).factors) == {"bfloat16"}


@pytest.mark.parametrize("case", [c for c in zoo.STORED if "bf16" in c.name], ids=lambda c: c.name)
def test_training_with_factors_in_half_precision(case):
    p, start = zoo.params(), float(zoo.loss(zoo.params()))
    state = case.tx.init(p)
    before = dtypes(state)
    p, state = case.train(p, state, range(40))
    assert dtypes(state) == before and "bfloat16" in names(zoo.engine_state(state).factors)
    assert all_finite((p, state)) and zoo.counters(state)["rejected"] == 0
    assert float(zoo.loss(p)) < 0.85 * start


def test_small_gradients_do_not_vanish():
    """Squares of 1e-5 are zero in float16: the fallback of layer methods squares in float32."""
    case = next(c for c in zoo.CASES if c.name == "kfac")
    p = half(zoo.params())
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-5, x.dtype), p)
    extra = case.measure(p, 0)[2]
    updates, state = shared_update(case)(grads, case.make().init(p), p, **extra)
    assert all_finite((updates, state)) and updates["scale"].dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(updates["scale"], np.float32), -case.rate, rtol=2e-2)


def test_stochastic_rounding_is_right_in_the_mean():
    x = jnp.asarray([1.001, -3.3e-5, 7e37, 0.0, 1.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    draws = jax.vmap(lambda k: stochastic_round(x, k))(jax.random.split(jax.random.key(0), 4000))
    down, up = (np.asarray(v, np.float32) for v in (jnp.min(draws, axis=0), jnp.max(draws, axis=0)))
    assert draws.dtype == jnp.bfloat16
    exact = np.asarray(draws[:, 3:], np.float32)
    np.testing.assert_array_equal(exact, np.broadcast_to(x[3:], exact.shape))
    assert np.all((down[:3] < x[:3]) & (x[:3] < up[:3]))
    assert all(len(np.unique(np.asarray(c, np.float32))) == 2 for c in draws[:, :3].T)
    mean = np.mean(np.asarray(draws[:, :3], np.float64), axis=0)
    np.testing.assert_allclose(mean, x[:3], rtol=3e-4)  # the spacing is 4e-3 to 8e-3


def test_small_updates_arrive_in_bfloat16_parameters():
    """500 updates of 1/1000: lost one by one if rounded to nearest."""
    p = {"w": jnp.ones(100, jnp.bfloat16), "b": jnp.ones(2), "n": None, "m": optax.MaskedNode()}
    u = {"w": jnp.full(100, 1e-3), "b": jnp.full(2, 1e-3), "n": None, "m": optax.MaskedNode()}

    @jax.jit
    def run(p):
        def body(t, p):
            return kj.apply_updates_stochastically(p, u, jax.random.fold_in(jax.random.key(1), t))

        return jax.lax.fori_loop(0, 500, body, p)

    ours, lost = run(p), optax.apply_updates({"w": p["w"]}, {"w": u["w"]})
    assert names(ours) == {"bfloat16", "float32"} and ours["n"] is None
    assert np.all(lost["w"] == 1)
    np.testing.assert_allclose(np.mean(np.asarray(ours["w"], np.float32)), 1.5, rtol=1e-2)
    np.testing.assert_allclose(ours["b"], 1.5, rtol=1e-4)
