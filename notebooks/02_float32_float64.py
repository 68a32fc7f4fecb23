# %% [markdown]
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/REPOSITORY/blob/main/notebooks/02_float32_float64.ipynb)
#
# # Float32 against float64
#
# The problem with which the [KrADagrad paper](https://arxiv.org/abs/2305.19416) argues: minimise
# tr(X' A X B) over X, where A and B have the eigenvalues 10 to 1e-9, so that the condition number
# is 1e20. The product itself is taken in float64; only the optimizer computes in float32 or
# float64.
#
# **What you should see:**
#
# * Shampoo's Gram statistic G G' in float32 knows nothing of eigenvalues below some 1e-7 of the
#   largest. With a tiny eps its inverse root amplifies that noise, and the loss ends some hundred
#   times higher than in float64, or more.
# * Kept as a square root (R with R'R = G G', updated by QR), float32 is as good as float64.
# * A larger eps repairs much of it without square roots.
# * KrADagrad\* keeps an inverse and does not mind the precision, as the paper says. It does not get
#   as far on this problem as Shampoo with a reasonable eps, which the paper says it does.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import kradagrad_jax as kj

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax 0.7
    from jax.experimental import enable_x64

N, STEPS = 64, 250


def problem(seed, q=8):
    """A, B and the start X. The larger q, the more eigenvalues are near the largest."""
    rng = np.random.default_rng(seed)
    eigenvalues = 10 * 10 ** (-10 * np.linspace(0, 1, N) ** q)

    def positive():
        basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
        return (basis * eigenvalues) @ basis.T

    return positive(), positive(), rng.standard_normal((N, N)).astype(np.float32)


# %% [markdown]
# ## What a Gram matrix forgets
#
# G is the gradient at the start, rounded to float32. Its statistic is formed in float32 as the
# product G G', and as the triangle R of a QR decomposition of G', whose squared singular values are
# the eigenvalues of the product. What is stored is float32; its eigenvalues are taken in float64.

# %%
a, b, x = problem(seed=0)
gradient = (2 * a @ x @ b).astype(np.float32)
exact = np.linalg.svd(gradient.astype(np.float64), compute_uv=False) ** 2
product = np.asarray(jnp.asarray(gradient) @ gradient.T)
root = np.asarray(jnp.linalg.qr(jnp.asarray(gradient.T), mode="r"))
gram = np.linalg.eigvalsh(product.astype(np.float64))[::-1]
triangle = np.linalg.svd(root.astype(np.float64), compute_uv=False) ** 2

figure, axis = plt.subplots(figsize=(6, 3.6))
axis.semilogy(exact, "k-", label="exact")
axis.semilogy(np.abs(gram), "o", ms=3, label="Gram matrix G G' in float32")
axis.semilogy(triangle, "x", ms=4, label="square root R in float32")
axis.set(xlabel="number of the eigenvalue", ylabel="absolute eigenvalue of G G'")
axis.legend()
figure.tight_layout()
plt.show()


def right(values):
    """How many decades below the largest eigenvalue all are right to 10 per cent."""
    wrong = np.flatnonzero(np.abs(values / exact - 1) > 0.1)
    last = wrong[0] - 1 if len(wrong) else len(exact) - 1
    return np.log10(exact[0] / exact[last])


print(f"right to 10%: Gram matrix down to 1e-{right(gram):.0f} of the largest, ", end="")
print(f"square root down to 1e-{right(triangle):.0f}; negative in the former: {(gram < 0).sum()}")

# %% [markdown]
# ## What follows for the loss
#
# Roots are computed every third step, the length of a step is that of the gradient, and the same
# momentum and learning rate are used for all, as in the paper's code.


# %%
def trained(make, dtype, seeds=(0, 1)):
    """Losses by step, one curve per seed."""
    with enable_x64(True):
        tx = make(dtype)

        def run(a, b, x):
            def loss(x):
                wide = x.astype(jnp.float64)
                return jnp.sum(wide * (a @ wide @ b))

            def step(carry, _):
                x, state = carry
                value, g = jax.value_and_grad(loss)(x)  # g is rounded to the float32 of x
                updates, state = tx.update(g, state, x)
                return (optax.apply_updates(x, updates), state), value

            (x, _), values = jax.lax.scan(step, (x, tx.init(x)), length=STEPS)
            return jnp.append(values, loss(x))

        run = jax.jit(run)
        return [np.asarray(run(*map(jnp.asarray, problem(seed)))) for seed in seeds]


SHARED = {
    "preset": "paper",
    "graft": "sgd",
    "refresh_every": 3,
    "timing": kj.Timing(start=3, phase=0),
}
RATE, MOMENTUM = 1.9 * 5e-3, 0.81  # the paper's code steps twice with momentum 0.9


def shampoo(statistics, eps):
    return lambda dtype: kj.shampoo(
        RATE,
        momentum=MOMENTUM,
        statistics=statistics,
        initial=eps,
        damping=eps,
        damping_rule="absolute",
        factor_dtype=dtype,
        **SHARED,
    )


def kradagrad_star(dtype):
    return kj.kradagrad_star(RATE, momentum=MOMENTUM, bound="sym", factor_dtype=dtype, **SHARED)


runs = {
    "gradient descent": (lambda dtype: optax.sgd(RATE, MOMENTUM), "float32"),
    "Shampoo, Gram, eps 1e-8, float32": (shampoo("gram", 1e-8), "float32"),
    "Shampoo, Gram, eps 1e-8, float64": (shampoo("gram", 1e-8), "float64"),
    "Shampoo, Gram, eps 1e-3, float32": (shampoo("gram", 1e-3), "float32"),
    "Shampoo, square root, eps 1e-8, float32": (shampoo("square_root", 1e-8), "float32"),
    "KrADagrad*, float32": (kradagrad_star, "float32"),
    "KrADagrad*, float64": (kradagrad_star, "float64"),
}
losses = {name: trained(*run) for name, run in runs.items()}
print(f"loss after {STEPS} steps{'':20} seed 0    seed 1")
for name, curves in losses.items():
    print(f"{name:40}" + "".join(f"{curve[-1]:10.3g}" for curve in curves))

# %%
figure, axis = plt.subplots(figsize=(8, 4.5))
for name, curves in losses.items():
    style = "--" if "float64" in name else "-"
    axis.semilogy(curves[0], style, lw=2.5 if style == "--" else 1.2, label=name)
axis.set(xlabel="step", ylabel="tr(X' A X B)", title="seed 0")
axis.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 1))
figure.tight_layout()
plt.show()

# %% [markdown]
# In float32, Gram statistics with eps 1e-8 stop where the noise takes over; how far they get
# differs from seed to seed and machine to machine. The curves of square roots in float32 and of
# Gram statistics in float64 lie on each other, as do the two curves of KrADagrad\*: how far it gets
# is decided by its first-order update and its start at the identity, not by the precision.
#
# ## What to try next
#
# * `problem(seed, q=2)`, whose eigenvalues are spread evenly: all is harder, the order is the same.
# * `preset="recommended"`: a damping relative to the largest eigenvalue, with which float32 Gram
#   statistics are usable anywhere.
# * The whole table, two values of q and all variants: `make quadratic` in a checkout.
# * K-FAC has square-root statistics as well: `kj.kfac(rate, spec, statistics="square_root")`.
