"""One of several processes that train together (run by test_processes.py).

Arguments: rank, number of processes, port, devices per process, alias, folder, step of death or 0.
Training goes on from the newest checkpoint in the folder; the last parameters are written there.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kradagrad_jax as kj
from tests.sharding import nets

RANK, COUNT, PORT, DEVICES = (int(x) for x in sys.argv[1:5])
NAME, FOLDER, DEATH = sys.argv[5], Path(sys.argv[6]), int(sys.argv[7])
STEPS, SAVE = 12, 6


def main():
    if COUNT > 1:
        jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, RANK)
    assert jax.device_count() == COUNT * DEVICES
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place(x, sharding):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    params = jax.tree.map(lambda x: place(x, whole), nets.params())
    tx = nets.make(NAME, sharding=kj.Sharding("data", mesh, pad_to=8))
    wanted = kj.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    take = nets.measure(NAME)

    def step(params, state, x, y, key):
        grads, extra = take(params, x, y, key)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    kept = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(step, out_shardings=(kept, wanted))
    with ocp.CheckpointManager(FOLDER / "checkpoints") as manager:
        first = manager.latest_step() or 0
        if first:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            params, state = manager.restore(first, args=ocp.args.StandardRestore(target))
        for t in range(first, STEPS):
            if DEATH and t == DEATH and RANK == COUNT - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            x, y = (place(v, rows) for v in nets.batch(t))
            params, state = step(params, state, x, y, jax.random.key(t))
            if t + 1 == SAVE and first < SAVE:
                manager.save(SAVE, args=ocp.args.StandardSave((params, state)))
                manager.wait_until_finished()
    assert int(state[0].count) == STEPS
    if RANK == 0:
        host = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(params)]
        np.savez(FOLDER / "params.npz", *host)
    if COUNT > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
