"""Run by test_meshes.py in a process with eight simulated devices.

Arguments: dtype, and names of aliases. Twenty steps on a mesh equal twenty steps on one device, the
program has the collectives that docs/scaling.md promises, every device holds its share of the
state.
"""

import os
import re
import sys

os.environ["JAX_ENABLE_X64"] = str(sys.argv[1] == "float64").lower()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kradagrad_jax as kj
from tests.sharding import nets

DTYPE = jnp.dtype(sys.argv[1])
TOLERANCE = 1e-12 if jnp.float64 == DTYPE else 1e-5
STEPS = 20
LINE = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
GRID = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(x):
    return P()


def by_rows(x):
    """Fully sharded data parallelism: every parameter along its first axis."""
    return P("data")


def by_columns(x):
    """Tensor parallelism: every parameter along its last axis."""
    return P(*[None] * (x.ndim - 1), "model")


PLACES = {
    "data parallel": (LINE, replicated, kj.Sharding("data", LINE)),
    "fully sharded": (LINE, by_rows, kj.Sharding("data", LINE, pad_to=16)),
    "2 x 4": (GRID, by_columns, kj.Sharding(("data", "model"), GRID, gather="preconditioners")),
}


def run(tx, params, state, batches, take, **placed):
    """Parameters, state and the compiled update."""
    update = None
    for t, (x, y) in enumerate(batches):
        grads, extra = take(params, x, y, jax.random.key(t))
        if update is None:
            update = jax.jit(tx.update, **placed).lower(grads, state, params, **extra).compile()
        updates, state = update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state, update.as_text()


def on_one_device(name, take):
    params = nets.params(DTYPE)
    tx = nets.make(name)
    batches = [nets.batch(t, DTYPE) for t in range(STEPS)]
    return run(tx, params, jax.jit(tx.init)(params), batches, take)[0]


def on_mesh(name, place, take):
    mesh, spec, sharding = PLACES[place]
    params = nets.params(DTYPE)
    params = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), params)
    tx = nets.make(name, sharding=sharding)
    wanted = kj.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    rows = NamedSharding(mesh, P("data"))
    batches = [jax.device_put(nets.batch(t, DTYPE), rows) for t in range(STEPS)]
    kept = (jax.tree.map(lambda x: x.sharding, params), wanted)
    return run(tx, params, state, batches, take, out_shardings=kept)


def count(kind, text):
    return len(re.findall(rf" {kind}(?:-start)?\(", text))


def check_collectives(name, place, text):
    """One all-gather per step where gradients are whole; rows of statistics are exchanged."""
    if place != "data parallel":
        return
    rows = name in nets.TAKE_ROWS
    found = {kind: count(kind, text) for kind in KINDS}
    # a layer whose shape no other layer has is treated by every device: its rows are gathered
    assert found["all-gather"] == 1 + 2 * rows, (name, found)
    assert found["all-to-all"] == 2 * rows, (name, found)
    assert found["collective-permute"] == found["reduce-scatter"] == 0, (name, found)


KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def check_refresh():
    """With `gather="preconditioners"` all-gathers are in a branch, which is that of a refresh.

    One of the preconditioners, one of the clocks of the blocks.
    """
    params = jax.device_put(nets.params(DTYPE), NamedSharding(LINE, P()))
    sharding = kj.Sharding("data", LINE, gather="preconditioners")
    tx = nets.make("shampoo", sharding=sharding)
    text = jax.jit(tx.update).lower(params, jax.jit(tx.init)(params), params).compile().as_text()
    assert count("all-gather", text) == 2
    assert count("all-gather", text[text.index("ENTRY") :]) == 0


def check_memory(name, place, state):
    """A device holds an eighth of every stack of two blocks or more, where updates are gathered."""
    sharding = PLACES[place][2]
    if sharding.gather != "updates":
        return
    divided = 0
    for x in jax.tree.leaves(state[0].factors):
        if len(x) > 1:
            assert len(x) % (sharding.pad_to or 8) == 0, (name, x.shape)
            assert x.addressable_shards[0].data.shape[0] == len(x) // 8, (name, x.sharding)
            divided += 1
    assert divided, name


def check_alias(name, takes):
    kind = nets.kind_of(name)
    take = takes.setdefault(kind, jax.jit(nets.measure(name)))
    alone = jax.device_get(on_one_device(name, take))
    start = nets.params(DTYPE)
    for place in PLACES:
        params, state, text = on_mesh(name, place, take)
        for a, b, c in zip(*map(jax.tree.leaves, (alone, params, start)), strict=True):
            scale = np.abs(a).max()
            error = np.abs(a - jax.device_get(b)).max() / scale
            assert error <= TOLERANCE, (name, place, error)
            assert np.abs(a - np.asarray(c)).max() > 100 * TOLERANCE * scale, (name, "did not move")
        check_memory(name, place, state)
        check_collectives(name, place, text)


def check_other_counts():
    """A state goes on with another number of devices."""
    params, grads = nets.params(DTYPE), jax.tree.map(jnp.cos, nets.params(DTYPE))

    def on(devices, **options):
        mesh = jax.make_mesh(
            (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        place = NamedSharding(mesh, P())
        tx = nets.make("shampoo", sharding=kj.Sharding("data", mesh, **options))
        return tx, jax.device_put(params, place), jax.device_put(grads, place)

    tx, p, g = on(8)
    state = tx.init(p)
    for _ in range(2):
        _, state = jax.jit(tx.update)(g, state, p)
    wanted = jax.device_get(jax.jit(tx.update)(g, state, p)[0])
    sizes = {}
    for devices in (1, 2, 3, 4):
        tx, p, g = on(devices)
        fitted = kj.fit_state(jax.device_get(state), tx.init(p))
        found = jax.device_get(jax.jit(tx.update)(g, fitted, p)[0])
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        if devices != 3:
            tx, p, g = on(devices, pad_to=8)
            sizes[devices] = [x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, p))]
    assert sizes[1] == sizes[2] == sizes[4] == [x.shape for x in jax.tree.leaves(state)]


if __name__ == "__main__":
    check_refresh()
    check_other_counts()
    takes = {}
    for alias in sys.argv[2:]:
        check_alias(alias, takes)
