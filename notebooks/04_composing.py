# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/REPOSITORY/blob/main/notebooks/04_composing.ipynb)
#
# # Composing: your own statistic and factor
#
# A method of this package is four pure functions on one block of a parameter. The engine does the
# rest: it cuts parameters into blocks, maps the functions over stacks of them, counts their
# statistics, times the refreshes, averages gradients, takes the length of the step from another
# method (grafting), undoes what is not finite. Here a method is written from nothing, *one-sided*
# Shampoo (also built in: `kj.scale_by_shampoo(exponent="one_sided")`): it whitens the shorter side
# of every matrix alone,
#
# $$S \leftarrow \beta S + (1 - \beta)\, G G^T, \qquad u = (S + \rho)^{-1/2} G.$$
#
# **What you should see:** the first step agrees with a formula in numpy; as an optimizer it is
# ahead of AdamW at one learning rate for all, with a state less than half as large as Shampoo's.
# Its statistic is exchanged without touching the factor, for one that is taken at every fifth step
# only and does about as well; and a few lines more make a method of layer inputs, which does so,
# too.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import kradagrad_jax as kj
from kradagrad_jax import curvature, linalg

# %% [markdown]
# ## The method
#
# Factorisations and products come from `kradagrad_jax.linalg`: they are float32 also where a device
# would multiply in less, and safe under `vmap`.


# %%
class OneSided(NamedTuple):
    statistic: jax.Array
    root: jax.Array


def one_sided(beta=0.99, damping=1e-6):
    def flat(x):  # the shorter side first
        return x if x.shape[0] <= x.shape[1] else x.T

    def init(shape, dtype):
        n = min(shape)
        return OneSided(jnp.zeros((n, n), dtype), jnp.eye(n, dtype=dtype))

    def accumulate(factor, statistic, step):
        new = linalg.matmul(flat(statistic), flat(statistic).T)
        return factor._replace(statistic=beta * factor.statistic + (1 - beta) * new)

    def refresh(factor, step):
        mean = factor.statistic / (1 - beta**step.statistics)
        return factor._replace(root=linalg.symmetric_power(mean, -0.5, damping))

    def precondition(factor, g, step):
        u = linalg.matmul(factor.root, flat(g))
        return u if g.shape[0] <= g.shape[1] else u.T

    return kj.BlockMethod(init, accumulate, refresh, precondition)


tx = kj.scale_by_blocks(one_sided(damping=1e-3))
g = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
update = jax.jit(tx.update)(g, jax.jit(tx.init)(g), g)[0]
w, v = np.linalg.eigh(g @ g.T)
expected = v @ np.diag((w + 1e-3 * w[-1]) ** -0.5) @ v.T @ g
print(f"first step, distance from the formula: {np.abs(update - expected).max():.1e}")

# %% [markdown]
# ## In an optax chain
#
# Grafting gives the step Adam's length, here that of Adam on gradients of norm one; the rest of the
# chain is optax's. The model is an autoencoder of digits with one hidden layer.


# %%
pixels = jnp.asarray(load_digits().data / 16, jnp.float32)
rng = np.random.default_rng(0)
order = np.concatenate([rng.permutation(1500).reshape(15, 100) for _ in range(10)])
STEPS, RATE = len(order), 1e-2


def initial():
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, 64, 32), np.float32) / 8
    return {
        "encoder": {"w": jnp.asarray(first), "b": jnp.zeros(32)},
        "decoder": {"w": jnp.asarray(second.T), "b": jnp.zeros(64)},
    }


def loss_fn(params, x):
    code = jnp.tanh(x @ params["encoder"]["w"] + params["encoder"]["b"])
    logits = code @ params["decoder"]["w"] + params["decoder"]["b"]
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, x))


gradient = curvature.value_grad_and_curvature(loss_fn, reducer="raw")  # layer statistics: see below
held_out = jax.jit(lambda params: loss_fn(params, pixels[1500:]))


def trained(direction, measure_every=1):
    """Losses on held-out digits."""
    schedule = optax.cosine_decay_schedule(RATE, STEPS)
    decay, rate = optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(schedule)
    tx = optax.chain(optax.clip_by_global_norm(1.0), direction, decay, rate)

    @jax.jit
    def step(params, state, batch, measure):
        _, grads, curv = gradient(params, pixels[batch])
        updates, state = tx.update(grads, state, params, curvature=curv, measure=measure)
        return optax.apply_updates(params, updates), state

    params, losses = initial(), []
    state = jax.jit(tx.init)(params)
    for i, batch in enumerate(order):
        params, state = step(params, state, batch, i % measure_every == 0)
        losses.append(float(held_out(params)))
    return losses


ENGINE = {"graft": kj.Graft("adam", normalize=True), "beta1": 0.9, "refresh_every": 5}
curves = {
    "AdamW": trained(optax.scale_by_adam()),
    "one-sided": trained(kj.scale_by_blocks(one_sided(), **ENGINE)),
}


def size(tx):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, initial())))


numbers = {"one-sided": kj.scale_by_blocks(one_sided(), **ENGINE)}
numbers |= {"Shampoo": kj.scale_by_shampoo(), "Adam": optax.scale_by_adam()}
print("numbers in the state:", {name: size(tx) for name, tx in numbers.items()})

# %% [markdown]
# ## Another statistic for the same factor
#
# `source=` says what is handed to `accumulate`: a function of the plan of blocks, the stacks of
# gradient blocks, and whatever else `update` was given. This one divides every block by its norm,
# so that no batch counts more than another, and takes a statistic only where `update` is told so.


# %%
def unit(plan, blocks, extra):
    def divided(stack):
        return stack / (jnp.linalg.norm(stack, axis=(1, 2), keepdims=True) + 1e-30)

    return {key: divided(stack) for key, stack in blocks.items()}, extra["measure"]


curves["one-sided, unit statistic, every 5th step"] = trained(
    kj.scale_by_blocks(one_sided(), source=unit, **ENGINE), measure_every=5
)

# %% [markdown]
# ## The same for layers
#
# `scale_by_layers` hands out `Rows(a, g)`, the inputs and output gradients of a layer, in place of
# the gradient. With the second moment of the inputs alone the direction is
# $(E[a a^T] + \rho)^{-1} G$.


# %%
def input_inverse(beta=0.95, damping=1e-3):
    def init(shape, dtype):
        return OneSided(jnp.zeros((shape[0],) * 2, dtype), jnp.eye(shape[0], dtype=dtype))

    def accumulate(factor, rows, step):
        new = linalg.matmul(rows.a.T, rows.a)
        return factor._replace(statistic=beta * factor.statistic + (1 - beta) * new)

    def refresh(factor, step):
        mean = factor.statistic / (1 - beta**step.statistics)
        return factor._replace(root=linalg.symmetric_power(mean, -1.0, damping))

    def precondition(factor, g, step):
        return linalg.matmul(factor.root, g)

    return kj.BlockMethod(init, accumulate, refresh, precondition)


spec = curvature.inspect(loss_fn, initial(), pixels[:100])
curves["inverse of inputs"] = trained(kj.scale_by_layers(input_inverse(), spec, **ENGINE))

# %%
print(f"loss on held-out digits after {STEPS} steps")
for name, losses in curves.items():
    print(f"{name:45} {losses[-1]:.4f}")

figure, axis = plt.subplots(figsize=(7, 4))
for name, losses in curves.items():
    axis.plot(1 + np.arange(STEPS), losses, label=name)
axis.set(xlabel="step", ylabel="loss on held-out digits", ylim=(0.23, 0.45))
axis.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# Nothing was tuned here: the plot says that the parts work together, not which optimizer is best.
#
# ## What to try next
#
# * `RATE = 3e-2` for AdamW, `damping=` and `beta=` of the method.
# * `print(kj.describe(tx, params))` shows blocks and bytes; `layout=kj.Layout(block_size=16)` cuts
#   smaller ones, `sharding=` spreads them over devices (`05_mesh`), both without a change of the
#   method. `kj.diagnostics(state)` has their counts and the norms of their factors.
# * Several methods in one transformation: `kj.Layout(group=...)` with a dict of methods, or
#   `optax.partition`.
# * How the package's own methods are written: `kradagrad_jax/factors`, one file each.
