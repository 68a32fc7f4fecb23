# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/REPOSITORY/blob/main/notebooks/01_quickstart.ipynb)
#
# # Quickstart: AdamW's line replaced
#
# An autoencoder of scikit-learn's 8x8 digits is trained twice with Flax NNX and twice with
# Flax linen. The only thing that differs between the runs is the line that makes the optimizer.
#
# **What you should see:** at AdamW's learning rate, Shampoo comes to the loss at which AdamW ends
# in about half of the steps, and ends lower. Its update costs more time, which matters for a net
# as small as this one; the last cell prints both.

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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits

import kradagrad_jax as kj

pixels = np.asarray(load_digits().data / 16, np.float32)
train, held_out = pixels[:1500], pixels[1500:]
rng = np.random.default_rng(0)
batches = [train[i] for _ in range(16) for i in rng.permutation(1500).reshape(15, 100)]
RATE, EVERY = 3e-3, 10  # one learning rate for all; steps between evaluations


def cross_entropy(logits, x):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, x))


# %% [markdown]
# ## Flax NNX
#
# `nnx.Optimizer` takes every optimizer of this package as it takes one of optax.

# %%
WIDTHS = (64, 64, 16, 64, 64)


def autoencoder(seed):
    layers, rngs = [], nnx.Rngs(seed)
    for i in range(len(WIDTHS) - 1):
        layers += [nnx.Linear(WIDTHS[i], WIDTHS[i + 1], rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers[:-1])


@nnx.jit
def nnx_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), x))(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def nnx_loss(model):
    return cross_entropy(model(held_out), held_out)


def train_nnx(tx):
    model = autoencoder(seed=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for i, x in enumerate(batches):
        if i % EVERY == 0:
            losses.append(float(nnx_loss(model)))
        nnx_step(model, optimizer, x)
    return [*losses, float(nnx_loss(model))]


with_nnx = {
    "AdamW": train_nnx(optax.adamw(RATE)),
    "Shampoo": train_nnx(kj.shampoo(RATE, weight_decay=1e-4)),  # <- the line that was replaced
}
for name, losses in with_nnx.items():
    print(f"NNX    {name:12} loss {losses[0]:.4f} -> {losses[-1]:.4f}")


# %% [markdown]
# ## Flax linen
#
# Parameters and state are plain trees here, and the training step is a function of them.


# %%
class Autoencoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        for i, width in enumerate(WIDTHS[1:]):
            x = linen.Dense(width)(x if i == 0 else linen.relu(x))
        return x


model = Autoencoder()
start = jax.jit(model.init)(jax.random.key(0), held_out)["params"]


def loss_fn(params, x):
    return cross_entropy(model.apply({"params": params}, x), x)


linen_loss = jax.jit(loss_fn)


def train_linen(tx):
    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state, losses, seconds = start, jax.jit(tx.init)(start), [], []
    for i, x in enumerate(batches):
        if i % EVERY == 0:
            losses.append(float(linen_loss(params, held_out)))
        before = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, x))
        seconds.append(time.perf_counter() - before)
    return [*losses, float(linen_loss(params, held_out))], 1e3 * np.median(seconds)


with_linen = {
    "AdamW": train_linen(optax.adamw(RATE)),
    "Shampoo": train_linen(kj.shampoo(RATE, weight_decay=1e-4)),
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
steps = EVERY * np.arange(len(with_nnx["AdamW"]))
for name, losses in with_nnx.items():
    axes[0].plot(steps, losses, label=name)
for name, (losses, _) in with_linen.items():
    axes[1].plot(steps, losses, label=name)
for axis, title in zip(axes, ("Flax NNX", "Flax linen"), strict=True):
    axis.set(xlabel="step", ylabel="loss on held-out digits", title=title, ylim=(0.24, 0.40))
    best = min(with_nnx["AdamW"] if axis is axes[0] else with_linen["AdamW"][0])
    axis.axhline(best, ls=":", color="grey", label="AdamW's best")
    axis.legend()
figure.tight_layout()
plt.show()

target = min(with_linen["AdamW"][0])
print(f"target: AdamW's best loss, {target:.4f}")
for name, (losses, milliseconds) in with_linen.items():
    reached = next((EVERY * i for i, loss in enumerate(losses) if loss <= target), None)
    print(f"linen  {name:12} reached after {reached} steps, ends at {losses[-1]:.4f}, ", end="")
    print(f"a step takes {milliseconds:.2f} ms")

# %% [markdown]
# The step with Shampoo is the slower one: gradients of this net take a fraction of a millisecond,
# so that the optimizer is most of the time. The larger the net and the batch, the smaller that
# part.
#
# ## What to try next
#
# * Other learning rates, for both: `RATE = 1e-3`, `1e-2`. Whoever compares optimizers tunes both.
# * `kj.shampoo(RATE, statistics="square_root")`, whose updates cost more and which float32 does not
#   hurt: `02_float32_float64`; `kj.kradagrad_star(RATE)`, `kj.sirfshampoo(RATE, batch_size=100)`.
# * Methods that look at the layers, K-FAC and SINGD: `03_kfac_singd_bf16`.
