"""What optax users expect of a transformation, for the methods that need `curvature=`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests import layer_registry as nets
from tests.layer_registry import MATMUL_ONLY, each
from tests.linalg.matrices import FACTORISATIONS, primitives
from tests.registry import all_finite, types

pytestmark = pytest.mark.lenient_promotion  # the net and the capture are not under test here


def trained(tx, steps, start=None):
    p = nets.params() if start is None else start
    state = tx.init(p)

    @jax.jit
    def step(p, state, x, y, key):
        loss, grads, found = nets.take(p, x, y, rng=key)
        updates, state = tx.update(grads, state, p, curvature=found)
        return optax.apply_updates(p, updates), state, loss

    losses = []
    for k in range(steps):
        x, y = nets.batch(k)
        x = x.astype(p["scale"].dtype)
        p, state, loss = step(p, state, x, y, jax.random.key(k))
        losses.append(float(loss))
    assert step._cache_size() == 1
    return p, state, losses


# tests/scale trains every alias; here are the variants, and one alias per algorithm
TRAINED = (*nets.FAMILIES, "kfac-official", "kfac-exact", "kfac-square_root", "rs_kfac", "ikfac",
           "singd-bf16")  # fmt: skip


@pytest.mark.slow
@each(names=TRAINED)
def test_trains_and_is_compiled_once(entry):
    p, state, losses = trained(entry.make(), 40)
    assert all_finite(p) and all_finite(state)
    assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:4]), losses
    assert int(optax.tree.get(state, "skipped")) == int(optax.tree.get(state, "rejected")) == 0


@each()
def test_init_is_abstract_and_structure_is_kept(entry):
    p = nets.params()
    tx, update = nets.compiled(entry)
    state = tx.init(p)
    assert types(jax.eval_shape(tx.init, p)) == types(state)
    _, grads, found = nets.measured(p)
    updates, after = update(grads, state, p, curvature=found)
    assert types(after) == types(state) and types(updates) == types(p)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    optax.tree.map_params(tx, lambda x: x, state)
    assert all(x.size for x in jax.tree.leaves(state))


@each()
def test_bad_numbers_change_nothing(entry):
    p = nets.params()
    tx, update = nets.compiled(entry)
    _, grads, found = nets.measured(p)
    _, state = update(grads, tx.init(p), p, curvature=found)
    for bad in (jnp.nan, jnp.inf):
        worse = jax.tree.map(lambda x, b=bad: x.at[(0,) * x.ndim].set(b), grads)
        updates, after = update(worse, state, p, curvature=found)
        assert all_finite(after) and not any(np.any(x) for x in jax.tree.leaves(updates))
        factors = [optax.tree.get(s, "factors") for s in (state, after)]
        jax.tree.map(np.testing.assert_array_equal, *factors)
        poisoned = jax.tree.map(
            lambda x, b=bad: x * b if jnp.issubdtype(x.dtype, jnp.floating) else x, found
        )
        updates, after = update(grads, state, p, curvature=poisoned)
        assert all_finite(after) and all_finite(updates)


@each(names=nets.FAMILIES)
def test_no_statistics_at_a_step(entry):
    p = nets.params()
    tx, update = nets.compiled(entry)
    _, grads, found = nets.measured(p)
    updates, state = update(grads, tx.init(p), p, curvature=None)  # at the very first, too
    assert all_finite(updates)
    updates, state = update(grads, state, p, curvature=found)
    assert all_finite(updates) and all_finite(state)
    with pytest.raises(ValueError, match="`curvature=` is missing"):
        tx.update(grads, state, p)


@pytest.mark.slow
@each(names=nets.FAMILIES)
@pytest.mark.parametrize("wrapper", ["chain", "masked", "partition", "inject_hyperparams"])
def test_wrappers(entry, wrapper):
    p = nets.params()
    _, grads, found = nets.measured(p)
    tx, update = nets.compiled(entry)
    expected = update(grads, tx.init(p), p, curvature=found)[0]
    labels = {k: "rest" if k == "scale" else "layers" for k in p}
    wrapped = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.identity()),
        "masked": lambda: optax.masked(tx, jax.tree.map(lambda x: True, p)),
        "partition": lambda: optax.partition({"layers": tx, "rest": optax.sgd(0.1)}, labels),
        "inject_hyperparams": lambda: optax.inject_hyperparams(entry.alias)(
            entry.rate, nets.spec(), **entry.options
        ),
    }[wrapper]()
    ours = jax.jit(wrapped.update)(grads, wrapped.init(p), p, curvature=found)[0]
    for name in ("dense0", "dense2"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
            ours[name],
            expected[name],
        )


@pytest.mark.slow
@each(names=nets.FAMILIES)
def test_scanned_steps_and_donation(entry):
    tx, p = nets.compiled(entry)[0], nets.params()
    x, y = nets.batch()

    def step(carry, k):
        p, state = carry
        _, grads, found = nets.take(p, x, y, rng=jax.random.fold_in(jax.random.key(0), k))
        updates, state = tx.update(grads, state, p, curvature=found)
        return (optax.apply_updates(p, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(4))[0], donate_argnums=0)
    (p, state) = run((p, tx.init(p)))
    assert int(kj.diagnostics(state)["statistics"]) >= 2 and all_finite(p)


@each(MATMUL_ONLY)
def test_no_factorisation_in_the_program(entry):
    tx, p = entry.make(), nets.params()
    _, grads, found = nets.measured(p)
    state = tx.init(p)
    names = primitives(
        jax.make_jaxpr(lambda s: tx.update(grads, s, p, curvature=found))(state).jaxpr
    )
    assert names and not names & FACTORISATIONS
