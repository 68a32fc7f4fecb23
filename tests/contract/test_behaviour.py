"""What an optimizer must do: descend, converge, stay finite, keep to its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import (
    LATE,
    SCALE_FREE,
    all_finite,
    assert_close,
    assert_equal,
    compiled,
    grads_at,
    having,
    over_aliases,
    over_core,
    over_entries,
    params_like,
)

STEPS = 4000


def parabola():
    return jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0]), square_distance


def rosenbrock():
    def objective(p, target):
        del target
        return (1.0 - p[0]) ** 2 + 100.0 * (p[1] - p[0] ** 2) ** 2

    return jnp.zeros(2), jnp.ones(2), objective


def matrix_parabola():
    return jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]]), square_distance


def mixed_tensors():
    target = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    return jax.tree.map(jnp.zeros_like, target), target, square_distance


def square_distance(p, target):
    differences = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), p, target)
    return jax.tree.reduce(jnp.add, differences)


def minimise(entry, problem, **changes):
    """Parameters after STEPS steps with a decaying learning rate, and the solution."""
    start, target, objective = problem()
    scale = 10.0 if problem is parabola else 1.0  # its solution is eleven away
    rates = optax.cosine_decay_schedule(scale * entry.learning_rate, STEPS)
    tx = entry.make(rates, **changes)

    @jax.jit
    def solve(params):
        def body(carry, _):
            grads = jax.grad(objective)(carry[0], target)
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=STEPS)[0][0]

    return solve(start), target


@pytest.mark.lenient_promotion  # of schedules and of optax.adam
@over_aliases
@pytest.mark.parametrize(
    "problem", [parabola, rosenbrock, matrix_parabola], ids=lambda f: f.__name__
)
def test_convergence(entry, problem):
    """optax's own targets, vectors with full-matrix factors instead of the diagonal fallback."""
    layout = kj.Layout(vectors="block")
    solution, target = minimise(entry, problem, layout=layout)
    assert_close(solution, target, rtol=3e-2, atol=3e-2)


@pytest.mark.lenient_promotion  # of schedules and of optax.adam
@over_core
def test_convergence_of_every_algorithm(entry):
    solution, target = minimise(entry, mixed_tensors)
    assert_close(solution, target, rtol=3e-2, atol=3e-2)


@over_core
def test_descent_at_every_step(entry):
    """<g, u> > 0 for every direction u, without averaging: positive definite preconditioners."""
    params = params_like()
    tx = entry.twin(beta1="none")
    update, state = jax.jit(tx.update), tx.init(params)
    for t in range(6):
        grads = grads_at(params, t)
        updates, state = update(grads, state, params)
        if t == 0 and LATE in entry.claims:
            assert not np.any(updates["w"])
            continue
        for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True):
            assert float(jnp.vdot(g, u)) > 0
    assert float(optax.tree.norm(updates)) > 0
    assert int(optax.tree.get(state, "rejected")) == 0


@over_entries
def test_any_scale_is_finite(entry):
    """Tiny, huge and zero gradients, the same one again, then ordinary ones."""
    params = params_like()
    _, init, update = compiled(entry.name)
    ordinary = [grads_at(params, t) for t in range(3)]
    for scale in (0.0, 1e-30, 1e-18, 1e18, 1e30):
        odd = jax.tree.map(lambda g, s=scale: s * g, ordinary[0])
        state = init(params)
        for grads in (odd, odd, *ordinary[1:]):
            updates, state = update(grads, state, params)
            assert all_finite((updates, state)), scale
        assert float(optax.tree.norm(updates)) > 0


@over_core
def test_a_parameter_whose_first_gradient_is_zero(entry):
    """Layers below a zero-initialised head: they move as soon as there is a gradient."""
    params = params_like({"w": (6, 5)})
    tx = entry.make()
    update, state = jax.jit(tx.update), tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for grads in (zero, grads_at(params, 1), grads_at(params, 2)):
        updates, state = update(grads, state, params)
        assert all_finite((updates, state))
    assert float(optax.tree.norm(updates)) > 1e-3 * entry.learning_rate


@over_entries
def test_rank_one_and_repeated_gradients(entry):
    params = params_like()
    _, init, update = compiled(entry.name)
    state = init(params)
    grads = jax.tree.map(lambda p: jnp.ones_like(p) * p.ravel()[0], params)
    for _ in range(12):
        updates, state = update(grads, state, params)
        assert all_finite((updates, state))
        assert float(optax.tree.norm(updates)) < 1e3 * entry.learning_rate


@over_entries
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_no_trace(entry, value):
    """Zero update, all state but the counts as before, one more in `skipped`."""
    params = params_like()
    _, init, update = compiled(entry.name)
    _, state = update(grads_at(params, 0), init(params), params)
    bad = grads_at(params, 1)
    bad["w"] = bad["w"].at[1, 2].set(value)
    updates, new = update(bad, state, params)
    if not entry.outer:
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert all_finite(new)
    assert int(optax.tree.get(new, "skipped")) == 1
    for name in ("mu", "nu", "factors", "clock", "rest"):
        old, kept = (optax.tree.get(s, name) for s in (state, new))
        assert_equal(kept, old)
    updates, new = update(grads_at(params, 2), new, params)
    assert all_finite((updates, new))


@having(SCALE_FREE)
def test_scale_of_the_loss_does_not_matter(entry):
    params = params_like()
    tx = entry.make(graft="none", fallback="identity", beta1="none", refresh_every=1)
    update = jax.jit(tx.update)
    results = []
    for scale in (1.0, 1024.0):
        state = tx.init(params)
        for t in range(4):
            grads = jax.tree.map(lambda g, s=scale: s * g, grads_at(params, t))
            updates, state = update(grads, state, params)
        results.append({k: updates[k] for k in ("w", "x")})
    assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


@over_aliases
def test_intervals_and_start(entry):
    """Statistics and roots change exactly at the steps that the timing says."""
    params = {"w": params_like()["w"]}
    timing = kj.Timing(start=3, first_refresh=2, phase=0)
    tx = entry.make(timing=timing, refresh_every=3, statistics_every=2, beta1="none")
    update, state = jax.jit(tx.update), tx.init(params)
    changed = {"statistics": [], "preconditioners": []}
    for t in range(1, 8):
        _, new = update(grads_at(params, t), state, params)
        for name, steps in changed.items():
            old, now = (getattr(optax.tree.get(s, "factors")["4x3"], name) for s in (state, new))
            if any(np.any(a != b) for a, b in zip(old, now, strict=True)):
                steps.append(t)
        state = new
    assert changed["statistics"] == [2, 4, 6]
    assert set(changed["preconditioners"]) <= {2, 3, 6}
    assert 6 in changed["preconditioners"]


@pytest.mark.lenient_promotion  # of schedules and of optax.adam
@over_aliases
def test_before_start_the_graft_steps(entry):
    """Adam's step before `start`, a blend during the ramp, the preconditioned one after it."""
    params = params_like()
    adam = optax.adam(entry.learning_rate)
    late = entry.make(timing=kj.Timing(start=100), graft=kj.Graft("adam"))
    states = late.init(params), adam.init(params)
    for t in range(3):
        ours, a = late.update(grads_at(params, t), states[0], params)
        theirs, b = adam.update(grads_at(params, t), states[1], params)
        states = a, b
        assert_close(ours, theirs, rtol=1e-4)
    ramp = kj.Timing(start=1, ramp=1)
    full, half, none = (
        entry.make(timing=t, **{"refresh_every": 1})
        for t in (kj.Timing(), ramp, kj.Timing(start=100))
    )
    first = [tx.update(params, tx.init(params), params)[0] for tx in (full, half, none)]
    blend = jax.tree.map(lambda a, b: 0.5 * (a + b), first[0], first[2])
    assert_close(first[1], blend, rtol=1e-3, atol=1e-5)


@over_aliases
def test_staggering_refreshes_every_block_once_a_period(entry):
    """All blocks at the first refresh, then a share at every step."""
    params = {f"w{i}": jnp.ones((4, 3)) for i in range(6)}
    tx = entry.make(timing=kj.Timing(stagger=True), refresh_every=3, beta1="none")
    update, state = jax.jit(tx.update), tx.init(params)
    per_step = []
    for t in range(1, 8):
        _, new = update(grads_at(params, t), state, params)
        roots = [optax.tree.get(s, "factors")["4x3"].preconditioners for s in (state, new)]
        moved = [np.any(np.asarray(a != b), axis=(1, 2)) for a, b in zip(*roots, strict=True)]
        per_step.append(int(np.any(moved, axis=0).sum()))
        state = new
    assert per_step[0] == 6
    assert max(per_step[1:]) <= 2
    if entry.name != "kradagrad":  # one mode per step: a block's turn may find nothing new
        assert per_step[1:] == [2] * 6
