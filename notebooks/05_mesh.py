# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/REPOSITORY/blob/main/notebooks/05_mesh.ipynb)
#
# # Scaling on a mesh
#
# The factors of a second-order method are larger than the parameters, and refreshing them is most
# of its work. With `sharding=kj.Sharding(axis)` blocks of equal shape are divided over the devices
# of a mesh axis: each holds, folds in and refreshes its share. Here eight devices are simulated on
# the CPU; a TPU on Colab (v5e-8, v2-8) has eight real ones, which the same code takes, untried.
#
# **What you should see:** every device holds an eighth of the state, the losses with and without
# a mesh are the same to rounding, and one all-gather per step is what the optimizer adds. Do not
# look at the time: eight simulated devices share the cores of one machine.

# %%
import subprocess
import sys
from glob import glob

if "google.colab" in sys.modules:
    # A wheel that you uploaded, or else the repository. The image keeps its own jax (--no-deps).
    package = [*glob("kradagrad_jax-*.whl"), "git+https://github.com/REPOSITORY"][0]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package]
    subprocess.run(command, check=True)

# %%
import os

# Before jax is imported; a process that has imported it keeps the devices that it has. The flag is
# about the CPU alone: real devices stay what they are.
if "jax" not in sys.modules:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kradagrad_jax as kj

devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
print(f"{len(devices)} devices of kind {devices[0].device_kind}")
if len(devices) == 1:
    print("jax was imported before this cell: restart the runtime and begin here")
mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)

# %% [markdown]
# ## A model whose layers have one shape
#
# Sixteen residual layers of one width; equal shapes are what divides well. The parameters lie on
# all devices, the batch is divided: data parallelism.

# %%
WIDTH, LAYERS, STEPS = 64, 16, 60
rng = np.random.default_rng(0)
start = {
    f"layer{i}": rng.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH for i in range(LAYERS)
}
x, y = rng.standard_normal((2, 256, WIDTH), np.float32)
everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def loss_fn(params, x, y):
    for w in params.values():
        x = x + jnp.tanh(x @ w)
    return jnp.mean((x - y) ** 2)


def trained(tx, params, state, batch, out_shardings):
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, out_shardings=out_shardings).lower(params, state, *batch).compile()
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return losses, state, step.as_text()


# %% [markdown]
# ## On one device, and on all
#
# What is new on the mesh: `sharding=`, and `kj.state_sharding`, which says for every array of the
# state where it lies. `jax.jit(tx.init, out_shardings=...)` makes the state there at once, so that
# it is never whole on one device; the step gets the same `out_shardings`.

# %%
alone = kj.shampoo(3e-3)
one = jax.device_put((start, (x, y)), devices[0])
losses_one, state_one, _ = trained(alone, one[0], jax.jit(alone.init)(one[0]), one[1], None)

tx = kj.shampoo(3e-3, sharding=kj.Sharding("data", mesh))
params = jax.device_put(start, everywhere)
where = kj.state_sharding(tx, params)
state = jax.jit(tx.init, out_shardings=where)(params)
placed = (jax.tree.map(lambda _: everywhere, params), where, None)
batch = jax.device_put((x, y), divided)
losses_all, state_all, program = trained(tx, params, state, batch, placed)
difference = np.max(np.abs(np.array(losses_all) / np.array(losses_one) - 1))
print(f"loss {losses_all[0]:.3f} -> {losses_all[-1]:.3f}")
print(f"largest relative difference between the losses: {difference:.1e}")

# %% [markdown]
# ## Where each array lies
#
# The sixteen blocks are one stack, and every device has two of them, with their factors, averages
# of gradients (`mu`), squares for the length of the step (`nu`) and clocks.


# %%
def held(tree):
    """Bytes of a tree on every device of the mesh."""
    total = dict.fromkeys(devices, 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device] += shard.data.nbytes
    return np.array(list(total.values())) / 1e3


print(f"{'array of the state':44} {'shape':>14}  {'on a device':>14}")
for path, leaf in jax.tree_util.tree_leaves_with_path(state_all[0]):
    if "layer" not in (name := jax.tree_util.keystr(path)) or "layer0" in name:
        mine = leaf.addressable_shards[0].data.shape
        print(f"{name:44} {leaf.shape!s:>14}  {mine!s:>14}")
for kind in ("all-gather", "all-reduce", "all-to-all"):
    count = program.count(f" {kind}(") + program.count(f" {kind}-start(")
    print(f"{kind} operations in the program of a step: {count}")

figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
axes[0].plot(losses_one, lw=4, alpha=0.4, label="one device")
axes[0].plot(losses_all, lw=1.2, color="k", label=f"{len(devices)} devices")
axes[0].set(xlabel="step", ylabel="loss")
axes[0].legend()
number = np.arange(len(devices))
axes[1].bar(number - 0.2, held(state_one), 0.4, label="one device")
axes[1].bar(number + 0.2, held(state_all), 0.4, label="mesh")
axes[1].set(xlabel="device", ylabel="state of the optimizer [kB]", xticks=number)
axes[1].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# Whole on one device, the state is the left bar. On the mesh a device holds an eighth of it. The
# all-gather collects the preconditioned gradients; the all-reduces are the average of the gradients
# over the batch, as with any optimizer, and a few numbers for the length of the steps and the count
# of what was undone.
#
# ## What to try next
#
# * Parameters divided as well (FSDP): `jax.device_put(start, divided)`. Gradients are then gathered
#   once per step before they are cut into blocks.
# * `kj.Sharding("data", mesh, gather="preconditioners")`: one all-gather per refresh in place of
#   one per step, for more memory.
# * Several hosts, checkpoints, other numbers of devices: the page on scaling of the documentation.
