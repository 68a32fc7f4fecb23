"""jit, scan, vmap, grad, donation, abstract initialisation, and what the traced program holds."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from tests.linalg.matrices import FACTORISATIONS, primitives
from tests.registry import (
    MATMUL_ONLY,
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
    run,
    types,
)


@over_entries
def test_init_without_arrays(entry):
    """eval_shape, ShapeDtypeStructs and arrays agree; jit(init) gives the same numbers."""
    params = params_like()
    tx, init, _ = compiled(entry.name)
    shapes = jax.eval_shape(lambda: params)
    state = tx.init(params)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    assert types(jax.eval_shape(tx.init, shapes)) == types(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(shapes)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert_equal(init(params), state)


@over_entries
def test_a_second_call_compiles_nothing(entry):
    params = params_like()
    tx = entry.make()
    traces = []

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    lowered = step.lower(params, tx.init(params), params)
    state_types = types(jax.eval_shape(tx.init, params))
    assert types(lowered.out_info[1]) == state_types  # so the next call finds the same program
    step.lower(params, jax.tree.map(lambda x: x + 0, tx.init(params)), params)
    assert len(traces) == 1


@over_core
def test_scan_equals_a_loop(entry):
    params = params_like()
    tx, init, update = compiled(entry.name)
    grads = [grads_at(params, t) for t in range(4)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    @jax.jit
    def scanned(params):
        def body(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), stacked)[0]

    assert_close(scanned(params), run(update, init(params), params, 4), rtol=1e-4, atol=1e-5)


@over_entries
def test_control_flow_accepts_the_state(entry):
    """cond, fori_loop and while_loop: their carries must keep every type."""
    params = params_like()
    tx = entry.make()
    state = tx.init(params)

    def step(carry):
        updates, new = tx.update(params, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), new

    start = (params, state)
    count = len(jax.tree.leaves(start))
    for program in (
        lambda: jax.lax.cond(jnp.asarray(True), lambda: step(start), lambda: start),
        lambda: jax.lax.fori_loop(0, 2, lambda _, c: step(c), start),
        lambda: jax.lax.while_loop(lambda c: optax.tree.norm(c[0]) > 1.0, step, start),
    ):
        assert len(jax.tree.leaves(jax.eval_shape(program))) == count


@over_core
def test_vmap_over_replicas(entry):
    """Init and update of two replicas equal two runs."""
    params = params_like()
    tx, init, update = compiled(entry.name)
    other = jax.tree.map(lambda p: 1.5 * p + 0.1, params)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, other)
    states = jax.vmap(tx.init)(both)
    vectorised = jax.jit(jax.vmap(tx.update))
    singles = [(params, init(params)), (other, init(other))]
    for _ in range(2):
        updates, states = vectorised(both, states, both)
        for i, (p, s) in enumerate(singles):
            alone, new = update(p, s, p)
            singles[i] = p, new
            mine = jax.tree.map(lambda u, i=i: u[i], updates)
            assert_close(mine, alone, rtol=1e-3, atol=1e-4)


@over_core
def test_gradients_through_an_update(entry):
    """Meta-learning: finite derivatives that are not zero."""
    params = params_like()
    tx = entry.make(refresh_every=1)
    state = tx.init(params)
    target = grads_at(params, 5)

    def loss(grads):
        updates, _ = tx.update(grads, state, params)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, updates, target))

    derivative = jax.jit(jax.grad(loss))(grads_at(params, 0))
    assert all_finite(derivative)
    assert optax.tree.norm(derivative) > 0


@over_aliases
def test_the_derivative_is_the_right_one(entry):
    """Against a central difference in a random direction; the same under checkpoint."""
    params = {"w": params_like()["w"]}
    tx = entry.make(1.0)
    state = tx.init(params)
    direction = grads_at(params, 7)

    def loss(eps):
        grads = jax.tree.map(lambda g, d: g + eps * d, grads_at(params, 0), direction)
        updates, _ = tx.update(grads, state, params)
        return jnp.vdot(updates["w"], direction["w"])

    slope, again = jax.jit(lambda e: (jax.grad(loss)(e), jax.grad(jax.checkpoint(loss))(e)))(
        jnp.float32(0.0)
    )
    np.testing.assert_allclose(again, slope, rtol=1e-4)
    step = 1e-2
    value = jax.jit(loss)
    numeric = (value(jnp.float32(step)) - value(jnp.float32(-step))) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2, atol=1e-3)


@over_entries
def test_donated_state(entry):
    """No leaf shares a buffer with another or with the parameters; donation gives no warning."""
    params = params_like()
    tx, init, update = compiled(entry.name)
    state = tx.init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, params))]
    assert len(set(pointers)) == len(pointers)
    expected = update(params, init(params), params)
    if entry.name not in ("shampoo", "kradagrad_star", "kradagrad"):
        return
    donating = jax.jit(tx.update, donate_argnums=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(donating(params, state, params), expected)


@having(MATMUL_ONLY)
def test_matmul_only_configurations_factorise_nothing(entry):
    params = params_like()
    tx = entry.make()
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    assert not primitives(program) & FACTORISATIONS
    assert "dot_general" in primitives(program)


def test_the_check_itself_finds_factorisations():
    params = params_like()
    for tx, name in (
        (kj.shampoo(0.1), "eigh"),
        (kj.shampoo(0.1, statistics="square_root"), "svd"),
        (kj.kradagrad_star(0.1, form="exact"), "svd"),
    ):
        program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        assert name in primitives(program) & FACTORISATIONS


@over_aliases
def test_kernels_do_not_multiply_with_depth(entry):
    """Twelve layers of one shape hold as many factorisations as two."""
    tx = entry.make()
    counts = []
    for depth in (2, 12):
        params = {f"layer{i}": jnp.ones((4, 3)) for i in range(depth)}
        text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
        counts.append((text.count(" eigh["), text.count("dot_general[")))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
