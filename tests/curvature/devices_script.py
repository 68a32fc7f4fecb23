"""Run by test_devices.py in a process with 8 virtual devices; prints one line per check."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kradagrad_jax import curvature
from tests.curvature import zoo

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def close(one, two):
    one, two = np.asarray(one), np.asarray(two)
    assert np.abs(one - two).max() <= 2e-5 * np.abs(two).max(), np.abs(one - two).max()


def batch_sharded():
    """Batch over 8 devices, parameters replicated: the same statistics, no all-gather."""
    loss, params, (x,) = zoo.mlp()
    step = jax.jit(curvature.value_grad_and_curvature(loss))
    wanted = step(params, x)[2]
    place = jax.device_put(x, NamedSharding(MESH, P("data")))
    params = jax.device_put(params, NamedSharding(MESH, P()))
    found = step(params, place)[2]
    for path in ("w1", "w2"):
        close(found.grams(path).a, wanted.grams(path).a)
        close(found.grams(path).g, wanted.grams(path).g)
    text = step.lower(params, place).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text
    print("batch sharded")


def shard_map_around():
    """Statistics of each device, psummed by hand; cotangents are of local means."""
    loss, params, (x,) = zoo.scanned_remat()
    x = jnp.concatenate([x] * 4)[:16] + jnp.arange(16.0)[:, None, None] / 16
    step = curvature.value_grad_and_curvature(loss)
    wanted = jax.jit(step)(params, x)[2]

    def local(params, x):
        _, _, curv = step(params, x)
        return jax.lax.psum((curv.stats, curv.terms), "data")

    mapped = jax.shard_map(local, mesh=MESH, in_specs=(P(), P("data")), out_specs=(P(), P()))
    stats, _ = jax.jit(mapped)(params, x)
    for path in ("layers/w", "out"):
        for key in ("A", "G", "abar", "P"):
            close(stats[path][0][key], wanted.stats[path][0][key])
    print("shard_map around")


if __name__ == "__main__":
    batch_sharded()
    shard_map_around()
