"""optax's own wrappers around ours: accumulation, guards, averaging, masks, monitoring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.registry import (
    all_finite,
    assert_close,
    assert_equal,
    compiled,
    grads_at,
    over_aliases,
    params_like,
    types,
)

pytestmark = pytest.mark.lenient_promotion  # the wrappers promote on their own

ODD = {"b": True, "w": False, "x": True}
WRAPPERS = {
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "decay": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("ours", tx)),
    "masked": lambda tx: optax.masked(tx, ODD),
    "partition": lambda tx: optax.partition({True: tx, False: optax.sgd(0.1)}, ODD),
    "freeze": lambda tx: optax.chain(tx, optax.transforms.freeze(ODD)),
    "selective": lambda tx: optax.selective_transform(tx, freeze_mask=ODD),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda c: c % 2 == 0),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda c: c % 2 == 0),
    "accumulate": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "skip": lambda tx: optax.MultiSteps(
        tx, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "mechanize": lambda tx: optax.contrib.mechanize(tx),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "snapshot": lambda tx: optax.chain(tx, optax.snapshot("norm", optax.tree.norm)),
}


@over_aliases
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped(entry, wrapper):
    """Traces; updates look like the gradients; the wrapper's state keeps its types."""
    params = params_like()
    tx = optax.with_extra_args_support(WRAPPERS[wrapper](entry.make()))
    state = jax.eval_shape(tx.init, params)

    def update(grads, state, params):
        return tx.update(grads, state, params, value=jnp.asarray(1.0))

    updates, new = jax.eval_shape(update, params, state, params)
    assert types(updates) == types(params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, new)]
    assert shapes[0] == shapes[1]


@over_aliases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulation_equals_the_mean_gradient(entry, dtype):
    params = params_like(dtype=dtype)
    tx = entry.make()
    many = optax.MultiSteps(tx, every_k_schedule=3)
    update, state = jax.jit(many.update), many.init(params)
    # multiples that bfloat16 adds without rounding
    parts = [jax.tree.map(lambda p, c=c: p * 0 + c * jnp.sign(p), params) for c in (1, 2, 3)]
    for part in parts[:2]:
        updates, state = update(part, state, params)
        assert not any(np.any(np.asarray(u, np.float32)) for u in jax.tree.leaves(updates))
    updates, state = update(parts[2], state, params)
    mean = jax.tree.map(lambda p: 2 * jnp.sign(p), params)
    expected, _ = jax.jit(tx.update)(mean, tx.init(params), params)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    assert_close(updates, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=1e-5)
    assert int(state.gradient_step) == 1


@over_aliases
def test_apply_if_finite_recovers(entry):
    """A NaN gradient leaves everything untouched; the next step is the one without it."""
    params = params_like()
    tx, init, plain = compiled(entry.name)
    guarded = optax.apply_if_finite(tx, 5)
    update, state = jax.jit(guarded.update), guarded.init(params)
    expected, inner = plain(grads_at(params, 0), init(params), params)
    _, state = update(grads_at(params, 0), state, params)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads_at(params, 1))
    updates, state = update(bad, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_close(state.inner_state, inner)
    updates, state = update(grads_at(params, 2), state, params)
    expected, _ = plain(grads_at(params, 2), inner, params)
    assert_close(updates, expected)


def test_lookahead():
    params = params_like()
    tx, _, _ = compiled("shampoo")
    ahead = optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(params)
    state = ahead.init(both)
    for t in range(3):
        updates, state = ahead.update(grads_at(params, t), state, both)
        both = optax.apply_updates(both, updates)
    assert all_finite(both)
    assert any(np.any(f != s) for f, s in zip(*map(jax.tree.leaves, both), strict=True))


def test_monitored_norms_are_those_of_the_updates():
    params = params_like()
    tx, init, update = compiled("kradagrad_star")
    watched = optax.chain(tx, optax.snapshot("norm", optax.tree.norm))
    _, state = jax.jit(watched.update)(grads_at(params, 0), watched.init(params), params)
    expected, _ = update(grads_at(params, 0), init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "norm"), optax.tree.norm(expected), rtol=1e-4)


def test_micro_batches():
    """Gradients by optax.microbatching feed the optimizer as whole-batch gradients do."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    params = params_like({"w": (4, 3)})

    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    micro = optax.microbatching.micro_grad(loss, argnums=0, batch_argnums=1, microbatch_size=2)
    whole = jax.grad(loss)(params, x)
    parts = micro(params, x)
    grads = parts[0] if isinstance(parts, tuple) else parts
    assert_close(jax.tree.map(lambda g: g / len(x), grads), whole, rtol=1e-4)
    tx, _, _ = compiled("shampoo")
    updates, _ = tx.update(grads, tx.init(params), params)
    assert all_finite(updates)


@over_aliases
def test_extra_arguments_pass_through_masks(entry):
    """Extra arguments shaped like the parameters are masked with them where asked for."""
    params = params_like()
    tx = optax.masked(entry.make(), ODD, mask_compatible_extra_args=True)
    updates, _ = tx.update(params, tx.init(params), params, like_params=params, other=3)
    assert_equal(updates["w"], params["w"])
