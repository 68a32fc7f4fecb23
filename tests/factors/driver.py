"""One block, driven as the engine promises to drive a method; draws and options of its tests."""

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.factors import (
    KradOptions,
)
from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.factors.singd import SingdOptions
from kradagrad_jax.factors.sirfshampoo import SirfOptions
from kradagrad_jax.linalg.structures import structure

SHAPE = (5, 4)


def finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def chosen(take, new, old):
    return jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)


def drive(method, draw, steps, *, shape=SHAPE, every=1, statistics_every=1, dtype=jnp.float32):
    """Final factor and step, directions of all steps, and rejections.

    ``draw``: step from 1 -> (statistic, gradient).
    """

    def one(carry, t):
        factor, taken, refreshed, bad = carry
        statistic, g = draw(t)
        parts = [jnp.any(x != 0) for x in jax.tree.leaves(statistic)]
        due = ((t - 1) % statistics_every == 0) & ((taken > 0) | jnp.all(jnp.stack(parts)))
        new = method.accumulate(factor, statistic, Step(t, every, taken + 1, refreshed))
        good = finite(new)
        factor = chosen(due & good, new, factor)
        taken, bad = taken + (due & good), bad + (due & ~good)
        if method.refresh is not None:
            refresh = method.refresh
            due = (taken > 0) & ((refreshed == 0) | ((t - 1) % every == 0))
            step = Step(t, every, taken, refreshed)
            new = jax.lax.cond(due, lambda f: refresh(f, step), lambda f: f, factor)
            good = finite(new)
            factor = chosen(good, new, factor)
            refreshed, bad = refreshed + (due & good), bad + (due & ~good)
        u = method.precondition(factor, g, Step(t, every, taken, refreshed))
        return (factor, taken, refreshed, bad), u

    zero = jnp.zeros((), jnp.int32)

    @jax.jit
    def run():
        start = (method.init(shape, dtype), zero, zero, zero)
        return jax.lax.scan(one, start, jnp.arange(1, steps + 1, dtype=jnp.int32))

    (factor, taken, refreshed, bad), u = run()
    return factor, Step(jnp.asarray(steps), every, taken, refreshed), u, int(bad)


def normal(t, shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), t), shape, dtype)


def gradients(scale=1.0, shape=SHAPE, dtype=jnp.float32):
    def draw(t):
        g = scale * normal(t, shape, dtype=dtype)
        return g, g

    return draw


def rows(t, shape=SHAPE, n=3, dtype=jnp.float32):
    a, g = (normal(t, (n, d), seed, dtype) for seed, d in enumerate(shape, 1))
    return Rows(a, g)


def layer(shape=SHAPE, n=3, dtype=jnp.float32):
    def draw(t):
        s = rows(t, shape, n, dtype)
        return s, s.a.T @ s.g

    return draw


def samples(t):
    return normal(t, (2, *SHAPE), 3)


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def shampoo(**kw):
    base = {
        "beta2": 0.9, "damping": 1e-6, "damping_rule": "relative", "initial": 0.0,
        "exponent": None, "bias_correction": True,
    }  # fmt: skip
    return base | kw


def krad(**kw):
    base = {
        "form": "direct", "bound": "sym", "initial": 1.0, "initial_scale": "gradient",
        "damping": 0.0, "beta2": 1.0, "exponent": None, "root": "eigh", "root_damping": 0.0,
    }  # fmt: skip
    return KradOptions(**(base | kw))


def sirf(lr_cov=0.6, names="dense", **kw):
    return SirfOptions(
        lambda dims: tuple(structure(names) for _ in dims),
        lambda order: (None,) * order,
        damping=1e-4,
        lr_cov=lr_cov,
        **({"riemannian_momentum": 0.0} | kw),
    )


SINGD = {
    "damping": 3e-5,
    "lr_cov": 0.8,
    "riemannian_momentum": 0.0,
    "normalize_lr_cov": "frobenius",
}


def singd(names="dense", **kw):
    return SingdOptions(structures=(structure(names),) * 2, **(SINGD | kw))
