"""What the properties draw: gradients of a few shapes with free values, and matrix helpers."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np

import kradagrad_jax as kj

MATRICES = [(4, 3), (3, 5), (1, 4)]
BLOCKS = kj.Layout(block_size=None, merge="none", vectors="block")
WHOLE = {"layout": BLOCKS, "fallback": "identity", "refresh_every": 1}


def arrays(shape, largest=3.0):
    """Free values: zeros, repeated rows and tiny numbers included."""
    elements = st.floats(-largest, largest, allow_nan=False, allow_subnormal=False)
    return hnp.arrays(np.float64, shape, elements=elements)


def streams(shapes, steps=4, largest=3.0):
    """A list of gradients of one shape, the shape from a handful."""
    return st.sampled_from(shapes).flatmap(
        lambda shape: st.lists(arrays(shape, largest), min_size=steps, max_size=steps)
    )


def dense(shape, seed, scale=1.0):
    """A generic gradient: full rank, for properties that need it."""
    return scale * np.random.default_rng(seed).normal(size=shape)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def spectrum(a):
    return np.linalg.eigvalsh((np.asarray(a) + np.asarray(a).T) / 2)


def smallest(a, scale):
    """Smallest eigenvalue of a symmetric matrix, relative to `scale`."""
    return spectrum(a)[0] / scale


def power(a, exponent):
    w, v = np.linalg.eigh((np.asarray(a) + np.asarray(a).T) / 2)
    return (v * np.maximum(w, 0.0) ** exponent) @ v.T


@functools.cache
def _jitted(scale_by, options):
    tx = scale_by(**dict(options))
    return tx, jax.jit(tx.update)


def trajectory(scale_by, grads, **options):
    """Directions and BlockStates of one parameter over a list of gradients."""
    tx, update = _jitted(scale_by, tuple(sorted(options.items())))
    state = tx.init({"p": jax.numpy.asarray(grads[0])})
    directions, states = [], [state]
    for g in grads:
        u, state = update({"p": jax.numpy.asarray(g)}, state)
        directions.append(np.asarray(u["p"]))
        states.append(state)
    return directions, states


def factors(state):
    """(statistics, preconditioners) of a state with one block, as lists of numpy matrices."""
    (factor,) = state.factors.values()
    return (
        [np.asarray(s[0]) for s in factor.statistics],
        [np.asarray(p[0]) for p in factor.preconditioners],
    )
