from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.linalg import when


def test_value_with_and_without_a_stack():
    old, x = jnp.arange(3.0), jnp.asarray([5.0, 6.0, 7.0])
    take = jnp.asarray([True, False, True])
    out = jax.jit(jax.vmap(lambda t, o, x: when(t, lambda o, x: o + x, o, x)))(take, old, x)
    np.testing.assert_array_equal(out, [5.0, 1.0, 9.0])
    assert when(take[0], lambda o: 2 * o, x[0]) == 10 and when(take[1], lambda o: 2 * o, x[0]) == 5


def test_a_stack_without_need_does_no_work():
    calls = []

    def work(old):
        jax.debug.callback(lambda: calls.append(1))
        return old + 1

    run = jax.jit(jax.vmap(lambda t, o: when(t, work, o)))
    for take, expected in ((jnp.zeros(3, bool), False), (jnp.asarray([False, True, False]), True)):
        calls.clear()
        jax.block_until_ready(run(take, jnp.zeros(3)))
        jax.effects_barrier()
        assert bool(calls) == expected


def test_work_on_what_does_not_change_is_not_done_ahead():
    """Compilers move such work out of loops."""
    calls = []

    def seen(x):
        calls.append(1)
        return x

    def work(old, x):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return old + jax.pure_callback(seen, kind, x, vmap_method="expand_dims")

    run = jax.jit(jax.vmap(lambda t, o, x: when(t, work, o, x)))
    for take, expected in ((jnp.zeros(3, bool), False), (jnp.asarray([False, True, False]), True)):
        calls.clear()
        jax.block_until_ready(run(take, jnp.zeros(3), jnp.ones(3)))
        assert bool(calls) == expected


def test_derivatives_reach_what_is_closed_over():
    take, x = jnp.asarray([True, False]), jnp.asarray([0.5, 0.7])

    def total(scale, x):
        one = lambda t, x, n: when(t, lambda o: scale * jnp.sin(o) * n, x)  # noqa: E731
        return jnp.sum(jax.vmap(one)(take, x, jnp.asarray([2.0, 3.0])))

    scale, slope = jax.jit(jax.grad(total, argnums=(0, 1)))(3.0, x)
    np.testing.assert_allclose(scale, 2 * np.sin(0.5), rtol=1e-6)
    np.testing.assert_allclose(slope, [6 * np.cos(0.5), 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        jax.jvp(lambda s: total(s, x), (3.0,), (1.0,))[1], 2 * np.sin(0.5), rtol=1e-6
    )


def test_other_trees_are_refused():
    with pytest.raises(TypeError, match="unlike the old value"):
        when(jnp.asarray(True), lambda o: (o, o), jnp.zeros(2))


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",))
    spec = jax.sharding.PartitionSpec("d")

    def run(take, x):
        return jax.vmap(lambda t, x: when(t, lambda o: o + 1, x))(take, x)

    take, x = jnp.asarray([True, False]), jnp.zeros(2)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else nullcontext():
        placed = jax.device_put((take, x), jax.sharding.NamedSharding(mesh, spec))
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        out = jax.jit(sharded)(*placed)
    np.testing.assert_array_equal(out, [1.0, 0.0])
