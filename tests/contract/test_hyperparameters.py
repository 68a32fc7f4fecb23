"""Learning rates, schedules, traced hyperparameters and intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import (
    assert_close,
    assert_equal,
    compiled,
    grads_at,
    over_aliases,
    over_core,
    params_like,
    run,
    types,
)


@over_aliases
def test_every_kind_of_learning_rate(entry):
    """Float, array, tracer and constant schedule: one trajectory."""
    params = params_like()
    tx, init, update = compiled(entry.name)
    expected, _ = run(update, init(params), params, 3)
    rate = entry.learning_rate
    scheduled = entry.make(optax.constant_schedule(rate))
    assert_close(run(jax.jit(scheduled.update), scheduled.init(params), params, 3)[0], expected)

    @jax.jit
    def traced(rate, grads, state):
        return entry.make(rate).update(grads, state, params)

    updates, _ = update(grads_at(params, 0), init(params), params)
    for value in (jnp.asarray(rate), np.float32(rate)):
        assert_close(traced(value, grads_at(params, 0), tx.init(params))[0], updates)


@over_aliases
def test_a_schedule_is_read_at_the_count(entry):
    params = params_like()
    rates = optax.linear_schedule(1.0, 0.0, 4)
    tx, unit = entry.make(rates), entry.make(optax.constant_schedule(1.0))
    update = jax.jit(lambda g, a, b: (tx.update(g, a, params), unit.update(g, b, params)))
    a, b = tx.init(params), unit.init(params)
    for t in range(5):
        (ours, a), (full, b) = update(grads_at(params, t), a, b)
        assert_close(ours, jax.tree.map(lambda u, t=t: u * rates(t), full))


@pytest.mark.lenient_promotion
@over_core
def test_inject_hyperparams_without_static_arguments(entry):
    """Every number becomes a traced array; updates and inner state are those of the plain one."""
    params = params_like()
    _, init, update = compiled(entry.name)
    arguments = {"learning_rate": entry.learning_rate} | entry.options | entry.outer
    if "timing" in arguments and arguments["timing"].stagger:
        pytest.skip("staggering needs a fixed interval; the error is tested below")
    injected = optax.inject_hyperparams(entry.alias)(**arguments)
    state, plain = injected.init(params), init(params)
    traced = jax.jit(injected.update)
    for t in range(2):
        ours, state = traced(grads_at(params, t), state, params)
        expected, plain = update(grads_at(params, t), plain, params)
        assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert_close(state.inner_state, plain, rtol=1e-4, atol=1e-5)
    assert {"learning_rate"} <= set(state.hyperparams)


@pytest.mark.lenient_promotion
@over_aliases
def test_hyperparameters_change_without_recompiling(entry):
    params = params_like()
    injected = optax.inject_hyperparams(entry.alias)(
        learning_rate=1.0, beta1=0.9, beta2=0.95, refresh_every=2, weight_decay=0.1, momentum=0.5
    )
    update = jax.jit(injected.update)
    grads = grads_at(params, 0)
    _, state = update(grads, injected.init(params), params)
    names = {"beta1", "beta2", "refresh_every", "weight_decay", "momentum"}
    assert set(state.hyperparams) >= names
    whole, after = update(grads, state, params)
    compilations = update._cache_size()
    state.hyperparams["learning_rate"] = jnp.full_like(state.hyperparams["learning_rate"], 0.25)
    quarter, _ = update(grads, state, params)
    assert_close(quarter, jax.tree.map(lambda u: 0.25 * u, whole))
    for name, value in (("refresh_every", 5), ("beta2", 0.5), ("momentum", 0.1)):
        after.hyperparams[name] = jnp.full_like(after.hyperparams[name], value)
        update(grads, after, params)
    assert update._cache_size() == compilations


@pytest.mark.lenient_promotion
def test_schedules_through_inject_hyperparams():
    """A float of the method as a function of the count; dtype of the hyperparameters respected."""
    params = {"w": params_like()["w"]}
    damping = optax.piecewise_constant_schedule(1e-6, {2: 1e6})
    injected = optax.inject_hyperparams(kj.shampoo, hyperparam_dtype=jnp.bfloat16)(
        learning_rate=0.1, damping=damping, refresh_every=1
    )
    state = injected.init(params)
    assert state.hyperparams["learning_rate"].dtype == jnp.bfloat16
    update = jax.jit(injected.update)
    seen = []
    for t in range(4):
        _, state = update(grads_at(params, t), state, params)
        seen.append(float(state.hyperparams["damping"]))
    assert np.allclose(seen, [1e-6, 1e-6, 1.0, 1.0], rtol=1e-2)
    plain = kj.shampoo(0.1, damping=1.0, refresh_every=1)
    other = plain.init(params)
    for t in range(4):
        _, other = jax.jit(plain.update)(grads_at(params, t), other, params)
    ours, theirs = (optax.tree.get(s, "factors")["4x3"].preconditioners for s in (state, other))
    assert_close(ours, theirs, rtol=2e-2)


@pytest.mark.lenient_promotion
def test_what_cannot_be_traced_says_so():
    """Errors that name the argument and the way out."""
    params = params_like()
    stagger = optax.inject_hyperparams(kj.shampoo)(
        learning_rate=0.1, timing=kj.Timing(stagger=True), refresh_every=3
    )
    with pytest.raises(ValueError, match="static_args"):
        stagger.init(params)
    fixed = optax.inject_hyperparams(kj.shampoo, static_args=("refresh_every",))(
        learning_rate=0.1, timing=kj.Timing(stagger=True), refresh_every=3
    )
    assert fixed.init(params)
    newton = optax.inject_hyperparams(kj.shampoo)(learning_rate=0.1, root="newton", exponent=0.5)
    with pytest.raises(ValueError, match="static_args"):
        newton.update(params, newton.init(params), params)


@over_aliases
@pytest.mark.parametrize("kind", ["array", "callable"])
def test_intervals_may_be_traced(entry, kind):
    """refresh_every and statistics_every as arrays and as functions of the count."""
    params = params_like()
    make = {"array": lambda n: jnp.asarray(n, jnp.int32), "callable": lambda n: lambda count: n}
    value = make[kind]
    plain = entry.make(refresh_every=3, statistics_every=2)
    other = entry.make(refresh_every=value(3), statistics_every=value(2))
    expected, state = run(jax.jit(plain.update), plain.init(params), params, 5)
    ours, new = run(jax.jit(other.update), other.init(params), params, 5)
    assert_close(ours, expected)
    assert_close(new, state)
    assert types(new) == types(state)
    assert int(kj.diagnostics(new)["statistics"]) == 3


def test_a_schedule_of_refreshes():
    """Every step first, then every third step."""
    params = {"w": params_like()["w"]}
    tx = kj.shampoo(0.1, refresh_every=lambda count: jnp.where(count < 4, 1, 3))
    update, state = jax.jit(tx.update), tx.init(params)
    changed = []
    for t in range(9):
        _, new = update(grads_at(params, t), state, params)
        roots = [optax.tree.get(s, "factors")["4x3"].preconditioners[0] for s in (state, new)]
        changed.append(bool(np.any(roots[0] != roots[1])))
        state = new
    assert changed == [t in (1, 2, 3, 4, 7) for t in range(1, 10)]


@over_aliases
def test_equal_arguments_give_equal_optimizers(entry):
    """Numbers as floats, numpy scalars and arrays, dtypes by name and by object."""
    params = params_like()
    variants = [
        entry.make(beta2=0.95, mu_dtype="bfloat16", factor_dtype="float32"),
        entry.make(
            beta2=np.float32(0.95), mu_dtype=jnp.bfloat16, factor_dtype=jnp.dtype("float32")
        ),
    ]
    states = [tx.init(params) for tx in variants]
    assert_equal(states[0], states[1])
    results = [tx.update(params, s, params)[0] for tx, s in zip(variants, states, strict=True)]
    assert_close(results[0], results[1])
