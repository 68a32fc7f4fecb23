"""Run by test_meshes.py in a process with eight simulated devices: a mesh with Explicit axes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kradagrad_jax as kj
from tests.registry import assert_close, types
from tests.sharding import nets

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SPECS = {
    "replicated": lambda x: P(*[None] * x.ndim),
    "rows": lambda x: P("data", *[None] * (x.ndim - 1)),
    "columns": lambda x: P(*[None] * (x.ndim - 1), "model"),
}
SHARDINGS = {
    "none": None,
    "updates": kj.Sharding(("data", "model")),
    "preconditioners": kj.Sharding("model", gather="preconditioners"),
}
PAIRS = list(zip(SPECS.values(), SHARDINGS.values(), strict=True))


def placed(tree, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(MESH, spec(x))), tree)


def statistics(name):
    """Gradients of one batch and the extra arguments of the update, on one device."""
    x, y = nets.batch(0)
    return jax.jit(nets.measure(name))(nets.params(), x, y, jax.random.key(0))


def check_types(name, grads, extra):
    """Shardings are part of the type: those of updates and state stay as they are."""
    for spec, sharding in PAIRS:
        with jax.set_mesh(MESH):
            params, g = placed(nets.params(), spec), placed(grads, spec)
            more = placed(extra, SPECS["replicated"])
            tx = nets.make(name, sharding=sharding)
            state = jax.eval_shape(tx.init, params)
            updates, new = jax.eval_shape(tx.update, g, state, params, **more)
            assert types(updates) == types(params), name
            assert types(new) == types(state), name


def check_optax_case(name):
    """optax's own test (float16, rank 3, one axis sharded), for methods without a spec."""
    with jax.set_mesh(MESH):
        params = jnp.zeros(
            (2, 8, 4), jnp.float16, out_sharding=NamedSharding(MESH, P(None, "data"))
        )
        options = {"fisher": "empirical"} if name in nets.SAMPLED else {}
        tx = nets.make(name, **options)
        state = tx.init(params)
        assert types(jax.eval_shape(tx.init, params)) == types(state)
        _, new = jax.eval_shape(tx.update, params, state, params)
        assert types(new) == types(state)


def check_numbers(name, grads, extra):
    """Two updates equal those on one device."""
    tx = nets.make(name)
    state, update = tx.init(nets.params()), jax.jit(tx.update)
    for _ in range(2):
        wanted, state = update(grads, state, nets.params(), **extra)
    for spec, sharding in PAIRS:
        with jax.set_mesh(MESH):
            params, g = placed(nets.params(), spec), placed(grads, spec)
            more = placed(extra, SPECS["replicated"])
            tx = nets.make(name, sharding=sharding)
            state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
            for _ in range(2):
                found, state = update(g, state, params, **more)
            assert_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-4, atol=1e-7)


def check_hyperparameters():
    """What does not work says what to do instead."""
    with jax.set_mesh(MESH):
        params = placed(nets.params(), SPECS["replicated"])
        injected = optax.inject_hyperparams(kj.shampoo)
        tx = injected(1e-3, sharding=SHARDINGS["updates"], beta2=0.9)
        state = tx.init(params)
        with pytest.raises(ValueError, match="static_args"):
            jax.eval_shape(tx.update, params, state, params)


def check_capture(grads):
    """Statistics are taken with automatic axes; without them the message says how."""
    with jax.set_mesh(MESH):
        params = placed(nets.params(), SPECS["replicated"])
        batch = placed(nets.batch(0), lambda x: P("data"))
        step = nets.measure("kfac")
        with pytest.raises(ValueError, match="auto_axes"):
            jax.eval_shape(step, params, *batch, jax.random.key(0))
        automatic = jax.jit(jax.sharding.auto_axes(step, out_sharding=P()))
        found, extra = automatic(params, *batch, jax.random.key(0))
        assert extra["curvature"].fresh
    assert_close(jax.device_get(found), jax.device_get(grads))


def main():
    measured = {kind: statistics(name) for kind, name in nets.ONE_OF_EACH.items()}
    for name in nets.ALIASES:
        grads, extra = measured[nets.kind_of(name)]
        check_types(name, grads, extra)
        if name not in nets.LAYERS:
            check_optax_case(name)
    for name in ("shampoo", "tnt", "kfac"):
        check_numbers(name, *measured[nets.kind_of(name)])
    check_hyperparameters()
    check_capture(measured["layers"][0])


if __name__ == "__main__":
    main()
