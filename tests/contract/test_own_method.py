"""A method of one's own: this file alone, and nothing changed in the engine.

The toy keeps one number per block: the running mean square of its gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import all_finite, assert_close, grads_at, params_like, types

DECAY = 0.5


def scalar_whitening(exponent=0.5):
    """BlockMethod: divide a block by the root of its mean square."""

    def init(shape, dtype):
        del shape
        return {"power": jnp.zeros((), dtype), "scale": jnp.ones((), dtype)}

    def accumulate(factor, gradient, step):
        weight = jnp.where(step.statistics == 1, 1.0, DECAY).astype(gradient.dtype)
        power = factor["power"] + weight * (jnp.mean(gradient**2) - factor["power"])
        return {**factor, "power": power}

    def refresh(factor, step):
        del step
        return {**factor, "scale": factor["power"] ** -exponent}

    def precondition(factor, gradient, step):
        del step
        return factor["scale"] * gradient

    return kj.BlockMethod(init, accumulate, refresh, precondition)


def reference(blocks, every):
    """The same for a list of gradients of one block, in numpy."""
    power, scale, out = 0.0, 1.0, []
    for t, g in enumerate(blocks, start=1):
        power = np.mean(g**2) if t == 1 else power + DECAY * (np.mean(g**2) - power)
        if (t - 1) % every == 0:
            scale = power**-0.5
        out.append(scale * g)
    return out


@pytest.mark.parametrize("every", [1, 2])
def test_every_block_is_treated_alone(every):
    """Two equal shapes in one bucket, a cut matrix and a tail: block by block as in numpy."""
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3)), "c": jnp.ones((5, 3))}
    layout = kj.Layout(block_size=4, merge="none", pieces="tail")
    tx = kj.scale_by_blocks(scalar_whitening(), layout=layout, refresh_every=every)
    update, state = jax.jit(tx.update), tx.init(params)
    grads = [grads_at(params, t) for t in range(4)]
    pieces = {"a": [np.s_[:]], "b": [np.s_[:]], "c": [np.s_[:4], np.s_[4:]]}
    for t, g in enumerate(grads):
        updates, state = update(g, state, params)
        for name, slices in pieces.items():
            for piece in slices:
                history = [np.asarray(h[name][piece]) for h in grads[: t + 1]]
                expected = reference(history, every)[-1]
                np.testing.assert_allclose(updates[name][piece], expected, rtol=1e-5)
    assert set(state.factors) == {"4x3", "1x3"}
    assert state.factors["4x3"]["power"].shape == (3,)


def test_everything_around_it_comes_for_free():
    """Grafting, start, fallback, staggering, masks, dtypes, scan, map_params."""
    params = params_like({"w": (4, 3), "k": (2, 2, 3), "b": (3,), "s": ()}, "bfloat16")
    tx = optax.chain(
        kj.scale_by_blocks(
            scalar_whitening(),
            graft="adam",
            beta1=0.9,
            refresh_every=3,
            timing=kj.Timing(start=2, ramp=2, stagger=True),
            fallback="rmsprop",
        ),
        optax.scale_by_learning_rate(0.1),
    )
    state = tx.init(params)

    def step(state, _):
        updates, new = tx.update(grads_at(params, 0), state, params)
        return new, updates

    last, updates = jax.lax.scan(step, state, length=5)
    assert types(last) == types(state)
    assert all_finite((last, updates))
    assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}
    assert optax.tree.map_params(tx, lambda v: v, last)
    masked = optax.masked(tx, {"w": True, "k": False, "b": True, "s": True})
    assert all_finite(masked.update(params, masked.init(params), params)[0])


def test_its_failures_are_caught_block_by_block():
    """A refresh that is not finite is undone for that block and counted."""
    tx = kj.scale_by_blocks(scalar_whitening(exponent=2.0), refresh_every=1)
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3))}
    grads = {"a": jnp.full((4, 3), 1e-11), "b": jnp.ones((4, 3))}  # 1e-22 ** -2 overflows
    updates, state = tx.update(grads, tx.init(params), params)
    assert int(state.rejected) == 1
    assert all_finite((updates, state))
    assert_close(updates, grads)
    assert state.clock["4x3"].refreshes.tolist() == [0, 1]


def test_a_gradient_of_zero_is_no_first_statistic():
    tx = kj.scale_by_blocks(scalar_whitening(), refresh_every=1)
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 3))}
    grads = {"a": jnp.zeros((4, 3)), "b": jnp.ones((4, 3))}  # 0 ** -0.5
    updates, state = tx.update(grads, tx.init(params), params)
    assert int(state.rejected) == 0
    assert_close(updates, grads)
    assert state.clock["4x3"].statistics.tolist() == [0, 1]


def test_statistics_from_elsewhere():
    """A source of statistics other than the gradient: an extra argument, or none at this step."""

    def source(plan, gradients, extra):
        del plan, gradients
        return extra.get("curvature")

    tx = kj.scale_by_blocks(scalar_whitening(), refresh_every=1, source=source)
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    statistics = {"4x3": jnp.full((1, 4, 3), 2.0)}
    updates, state = tx.update(params, state, params, curvature=statistics)
    np.testing.assert_allclose(updates["w"], 0.5)
    assert int(kj.diagnostics(state)["statistics"]) == 1
    updates, state = tx.update(params, state, params)
    np.testing.assert_allclose(updates["w"], 0.5)
    assert int(kj.diagnostics(state)["statistics"]) == 1
