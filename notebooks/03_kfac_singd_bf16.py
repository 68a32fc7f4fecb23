# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/REPOSITORY/blob/main/notebooks/03_kfac_singd_bf16.ipynb)
#
# # K-FAC and SINGD in bfloat16
#
# Both precondition the gradient of a layer by what goes into it and what comes back: the inputs a
# and the gradients g at its outputs. Here both are taken from an ordinary function without
# registering a layer, and a net that computes in bfloat16 is trained with them.
#
# **What you should see:**
#
# * The sum of a g' over a batch is the gradient: the capture is right.
# * With AdamW's learning rate K-FAC ends well below AdamW's loss, SINGD with dense factors below,
#   with diagonal ones about there.
# * SINGD's factors may be bfloat16, and of a sparse structure: with diagonal ones its state is half
#   of AdamW's. K-FAC's are refused in bfloat16, because it inverts them.
# * No number is ever infinite or NaN, and no step was undone.

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
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import kradagrad_jax as kj
from kradagrad_jax import curvature

digits = load_digits()
x_all, y_all = jnp.asarray(digits.data / 16, jnp.bfloat16), jnp.asarray(digits.target)
x_test, y_test = x_all[1500:], y_all[1500:]
rng = np.random.default_rng(0)
order = np.concatenate([rng.permutation(1500).reshape(15, 100) for _ in range(12)])
WIDTHS = (64, 128, 10)
EVERY = 5  # steps between evaluations


def initial():
    """Parameters in float32, one dict per layer."""
    rng = np.random.default_rng(1)
    shapes = pairwise(WIDTHS)
    normal = [rng.standard_normal(shape, np.float32) / shape[0] ** 0.5 for shape in shapes]
    return [{"w": jnp.asarray(w), "b": jnp.zeros(w.shape[1])} for w in normal]


def model(params, x):
    """Computes in bfloat16; the logits are float32."""
    for i, layer in enumerate(params):
        w, b = (layer[name].astype(jnp.bfloat16) for name in ("w", "b"))
        x = (x if i == 0 else jax.nn.relu(x)) @ w + b
    return x.astype(jnp.float32)


params = initial()

# %% [markdown]
# ## Inputs and output gradients of every layer
#
# `inspect` traces the model and says which parameters belong to which layer. A step with
# `reducer="raw"` hands out the rows a and g themselves; the default, `"kron"`, hands out their
# second moments. With `fisher="empirical"` g is taken at the true labels, so that the gradient can
# be made of the rows; with `"mc"` at labels that are drawn from the model, as K-FAC wants it.

# %%
spec = curvature.inspect(model, params, x_test)
print(spec)

likelihood = curvature.losses.softmax_cross_entropy()


def capture(fisher):
    return curvature.model_value_grad_and_curvature(model, likelihood, fisher=fisher, reducer="raw")


loss, grads, raw = jax.jit(capture("empirical"))(params, x_test, y_test)
path = spec.layers[0].path
rows = raw.rows(path)
product = np.asarray(rows.a[0]).T @ np.asarray(
    rows.g[0]
)  # the last row is the bias: a ends in a constant 1
gradient = np.vstack([grads[0]["w"], grads[0]["b"]])
error = np.linalg.norm(product - gradient) / np.linalg.norm(gradient)
print(f"{path}: a {rows.a.shape[1:]}, g {rows.g.shape[1:]}, all {rows.a.dtype}")
print(f"distance of the sum of a g' from the gradient: {error:.1e} (bfloat16 rounds at 4e-3)")


# %% [markdown]
# ## Training
#
# One learning rate for all, which is AdamW's. The step is the same for every method; AdamW ignores
# the statistics.


# %%
@jax.jit
def gradient(params, batch, i):
    draw = jax.random.fold_in(jax.random.key(1), i)
    return capture("mc")(params, x_all[batch], y_all[batch], rng=draw)


@jax.jit
def test_loss(params):
    return likelihood.value(model(params, x_test), y_test)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def trained(tx):
    @jax.jit
    def change(params, state, grads, curv):
        updates, state = tx.update(grads, state, params, curvature=curv)
        return optax.apply_updates(params, updates), state

    tx = optax.with_extra_args_support(tx)
    params, losses = initial(), []
    state = jax.jit(tx.init)(params)
    for i, batch in enumerate(order):
        _, grads, curv = gradient(params, batch, i)
        params, state = change(params, state, grads, curv)
        if i % EVERY == EVERY - 1:
            losses.append(float(test_loss(params)))
    parts = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, kj.BlockState))
    blocks = [part for part in parts if isinstance(part, kj.BlockState)]  # none in AdamW's
    undone = sum(int(part.skipped) + int(part.rejected) for part in blocks)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return losses, size, undone, finite((params, state, losses))


RATE = 3e-3
half = {"lr_cov": 0.1, "factor_dtype": jnp.bfloat16}  # below 0.1 bfloat16 factors stop moving
results = {
    "AdamW": trained(optax.adamw(RATE)),
    "K-FAC": trained(kj.kfac(RATE, spec)),
    "SINGD, dense, bf16 factors": trained(kj.singd(RATE, spec, **half)),
    "SINGD, diagonal, bf16 factors": trained(kj.singd(RATE, spec, structures="diagonal", **half)),
}
print(f"{'':32}  loss   state [kB]  steps undone  all finite")
for name, (losses, size, undone, good) in results.items():
    print(f"{name:32} {losses[-1]:.3f} {size / 1e3:11.1f} {undone:13} {good!s:>11}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4))
for name, (losses, *_) in results.items():
    axes[0].semilogy(EVERY * (1 + np.arange(len(losses))), losses, label=name)
axes[0].set(xlabel="step", ylabel="loss on held-out digits")
axes[0].legend(fontsize=8)
sizes = [size / 1e3 for _, size, *_ in results.values()]
axes[1].barh(list(results), sizes, color=[f"C{i}" for i in range(len(sizes))])
axes[1].set(xlabel="state of the optimizer [kB]")
axes[1].invert_yaxis()
figure.tight_layout()
plt.show()

# %%
try:
    kj.kfac(RATE, spec, factor_dtype=jnp.bfloat16).init(params)
except ValueError as refusal:
    print("K-FAC:", refusal)

# %% [markdown]
# ## What to try next
#
# * `structures="hierarchical:8,8"`, between dense and diagonal; a pair of names is for K and C.
# * SINGD with float32 factors and the default `lr_cov`: `kj.singd(RATE, spec)`.
# * Parameters in bfloat16 as well: `kj.apply_updates_stochastically(params, updates, key)` in place
#   of `optax.apply_updates` keeps what rounding to nearest would lose.
# * A model of yours: print `curvature.inspect(model, params, x)` first. Flax NNX has
#   `curvature.nnx_value_grad_and_curvature`.
