"""Run by test_sharding.py in a process with four simulated devices; argument: the kind of mesh."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.registry import ALIASES, ENTRIES, assert_close, types

SPECS = {"rows": P("d", None), "columns": P(None, "d"), "whole": P(None, None)}
SHAPES = {"w": (8, 4), "x": (4, 8), "b": (8,), "k": (2, 4, 8)}


def mesh_of(kind):
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


def placed(mesh, spec):
    """Parameters of several shapes: matrices by `spec`, the others over their last axis."""
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in SHAPES.items():
        own = spec if len(shape) == 2 else P(*[None] * (len(shape) - 1), "d")
        value = jnp.asarray(rng.normal(size=shape), jnp.float32)
        out[name] = jax.device_put(value, NamedSharding(mesh, own))
    return out


def check_explicit_types():
    """Shardings are part of the type: equal after init, update and their jitted forms."""
    mesh = mesh_of(AxisType.Explicit)
    for number, spec in enumerate(SPECS.values()):
        with jax.set_mesh(mesh):
            params = placed(mesh, spec)
            # all placements for one of each method, one of them for its variants
            for entry in [*ALIASES, *ENTRIES[len(ALIASES) + number :: len(SPECS)]]:
                tx = entry.make()
                state = jax.eval_shape(tx.init, params)
                updates, new = jax.eval_shape(tx.update, params, state, params)
                assert types(new) == types(state), (entry.name, spec)
                assert types(updates) == types(params), (entry.name, spec)


def check_optax_case():
    """optax's own test: float16, rank 3, one axis sharded; eager and jitted."""
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=NamedSharding(mesh, P(None, "d")))
        for entry in ALIASES:
            tx = entry.make()
            state = tx.init(params)
            assert types(jax.jit(tx.init)(params)) == types(state)
            _, new = jax.jit(tx.update)(params, state, params)
            assert types(new) == types(state)


def check_shard_map():
    """Data parallelism by hand: gradients averaged over the axis, states equal everywhere."""
    mesh = mesh_of(AxisType.Auto)
    entry = ALIASES[0]
    tx = entry.make()
    params = jax.device_get(placed(mesh, SPECS["whole"]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)

    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), "d")
        return tx.update(grads, state, params)

    whole, parts = P(), P("d")
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(whole, whole, parts), out_specs=(whole, whole), check_vma=False
    )
    state = tx.init(params)
    ours, _ = jax.jit(sharded)(params, state, x)
    expected, _ = jax.jit(tx.update)(jax.grad(loss)(params, x), state, params)
    assert_close(jax.device_get(ours), jax.device_get(expected), rtol=1e-3, atol=1e-5)


def main(kind):
    assert jax.device_count() == 4
    assert optax.__version__
    if kind == "explicit":
        check_explicit_types()
        check_optax_case()
    else:
        check_shard_map()


if __name__ == "__main__":
    main(sys.argv[1])
