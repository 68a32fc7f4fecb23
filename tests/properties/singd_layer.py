"""One layer of IKFAC, INGD and SINGD in float64: statistics, runs of factors, dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.factors.method import Grams, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.linalg.structures import structure

D_IN, D_OUT = 6, 4
MIXES = [
    ("dense", "dense"), ("dense", "diagonal"), ("hierarchical:2,2", "triu_toeplitz"),
    ("tril_toeplitz", "block_diagonal:3"), ("triu_top_left_diag:2", "tril"),
]  # fmt: skip


def options(names=("dense", "dense"), ikfac=False, **others):
    others = {"damping": 0.1, "lr_cov": 0.1, "riemannian_momentum": 0.0} | others
    pair = (structure(names[0]), structure(names[1]))
    return SingdOptions(structures=pair, adaptive=not ikfac, **others)


def moment(seed, d, scale=1.0):
    x = np.random.default_rng(seed).normal(size=(3 * d, d))
    return scale * x.T @ x / len(x)


def grams(steps, varying=False, d_in=D_IN, d_out=D_OUT):
    """(U, G) of every step, stacked."""
    seeds = [10 * t * varying for t in range(steps)]
    a = np.stack([moment(s + 1, d_in) for s in seeds])
    return Grams(jnp.asarray(a), jnp.asarray(np.stack([moment(s + 2, d_out) for s in seeds])))


def at(t):
    count = jnp.asarray(t, jnp.int32) + 1
    return Step(count, 1, count, count - 1)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype",))
def run(o, statistics, start=None, dtype=jnp.float64):
    """Factors after every step, stacked."""
    method = singd_method(o)
    shape = (statistics.a.shape[-1], statistics.g.shape[-1])
    first = method.init(shape, dtype) if start is None else start

    def step(factor, now):
        t, s = now
        factor = method.accumulate(factor, s, at(t))
        return factor, factor

    return jax.lax.scan(step, first, (jnp.arange(len(statistics.a)), statistics))[1]


@functools.partial(jax.jit, static_argnums=0)
def _last(o, factors):
    pick = [jax.tree.map(lambda x: x[-1], x) for x in (factors.k, factors.c)]
    return [s.to_dense(x) for s, x in zip(o.structures, pick, strict=True)]


def dense_of(o, factors):
    """K and C after the last step as dense numpy arrays."""
    return [np.asarray(x) for x in _last(o, factors)]


def roots(names=("dense", "dense"), steps=1, varying=False, **others):
    o = options(names, **others)
    return dense_of(o, run(o, grams(steps, varying)))


def norm(x):
    return float(np.linalg.norm(x))


@functools.partial(jax.jit, static_argnums=0)
def _update(o, s, gradient):
    factor = jax.tree.map(lambda x: x[-1], run(o, s))
    return singd_method(o).precondition(factor, gradient, at(0))


def update_of(names, s, gradient, **others):
    """The gradient preconditioned by the factors after the last step."""
    return np.asarray(_update(options(names, **others), s, jnp.asarray(gradient)))
