"""Shampoo as a transformation (shampoo.md section 5, numbers in the names)."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

import kradagrad_jax as kj
from kradagrad_jax.linalg import inverse_root, symmetric_power
from tests.properties.draws import (
    MATRICES,
    WHOLE,
    dense,
    factors,
    orthogonal,
    power,
    smallest,
    spectrum,
    streams,
    trajectory,
)

PAPER = {"preset": "paper", **WHOLE}
SHAMPOO = kj.scale_by_shampoo
seeds = st.integers(0, 2**32 - 1)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def array_form(statistics):
    """The Gram statistic of a square-root factor R with R^T R = S."""
    return [r.T @ r for r in statistics]


@given(grads=streams(MATRICES), eps=st.sampled_from([1e-4, 1e-1]))
def test_01_the_root_is_a_root_and_everything_is_monotone(grads, eps):
    """P^(2k) S = I; S grows, P falls, from the first gradient that is not zero."""
    _, states = trajectory(SHAMPOO, grads, initial=eps, **PAPER)
    begun = [s for s in states if kj.diagnostics(s)["refreshes"] > 0]
    assert len(begun) == len(list(itertools.dropwhile(lambda g: not np.any(g), grads)))
    for before, after in itertools.pairwise(begun):
        (s_old, p_old), (s_new, p_new) = factors(before), factors(after)
        for s, t, p, q in zip(s_old, s_new, p_old, p_new, strict=True):
            condition = spectrum(t)[-1] / spectrum(t)[0]
            product = np.linalg.matrix_power(q, 4) @ t
            assert np.abs(product - np.eye(len(t))).max() < 1e-13 * condition + 1e-12
            np.testing.assert_array_equal(t, t.T)
            assert smallest(t - s, spectrum(t)[-1]) > -1e-14
            assert smallest(p - q, spectrum(p)[-1]) > -1e-13 * condition - 1e-13


@given(seed=seeds, rank=st.sampled_from([1, 2, 3]))
def test_02_domination_of_the_full_matrix(seed, rank):
    """S_2^(1/2) kron S_1^(1/2) >= sum vec(G) vec(G)^T / rank."""
    rng = np.random.default_rng(seed)
    grads = [rng.normal(size=(4, rank)) @ rng.normal(size=(rank, 3)) for _ in range(5)]
    _, states = trajectory(SHAMPOO, grads, initial=1e-6, **PAPER)
    rows, columns = factors(states[-1])[0]
    both = np.kron(power(columns, 0.5), power(rows, 0.5))
    full = sum(np.outer(g.T.ravel(), g.T.ravel()) for g in grads)
    assert smallest(both - full / rank, spectrum(both)[-1]) > -1e-12


@given(seed=seeds)
def test_03_one_step_without_a_ridge_is_the_polar_factor(seed):
    g = dense((4, 4), seed) + 3 * orthogonal(4, seed)
    directions, _ = trajectory(SHAMPOO, [g], initial=0.0, **PAPER)
    u, _, vt = np.linalg.svd(g)
    assert relative(directions[0], u @ vt) < 1e-8


@pytest.mark.parametrize("shape", [(5,), (4, 4), (2, 3, 2)], ids=str)
@given(seed=seeds, factor=st.sampled_from([1e-4, 3.0, 1e5]))
def test_04_scale_invariance(shape, seed, factor):
    grads = [dense(shape, (seed, j)) for j in range(6)]
    plain, _ = trajectory(SHAMPOO, grads, initial=0.0, **PAPER)
    other, _ = trajectory(SHAMPOO, [factor * g for g in grads], initial=0.0, **PAPER)
    assert relative(other[-1], plain[-1]) < 1e-7


@given(seed=seeds)
def test_04_orthogonal_equivariance(seed):
    left, right = orthogonal(4, seed), orthogonal(3, seed + 1)
    grads = [dense((4, 3), (seed, j)) for j in range(4)]
    plain, _ = trajectory(SHAMPOO, grads, **PAPER)
    turned, _ = trajectory(SHAMPOO, [left @ g @ right.T for g in grads], **PAPER)
    for u, v in zip(plain, turned, strict=True):
        assert relative(v, left @ u @ right.T) < 1e-8


@given(seed=seeds, eps=st.sampled_from([1e-3, 1.0]))
def test_05_a_vector_is_full_matrix_adagrad(seed, eps):
    grads = [dense((5,), (seed, j)) for j in range(4)]
    directions, _ = trajectory(SHAMPOO, grads, initial=eps, **PAPER)
    total = eps * np.eye(5) + sum(np.outer(g, g) for g in grads)
    assert relative(directions[-1], power(np.linalg.inv(total), 0.5) @ grads[-1]) < 1e-9


@given(grads=streams([(1,)], steps=5))
def test_05_one_number_is_adagrad(grads):
    directions, _ = trajectory(SHAMPOO, grads, initial=1e-2, **PAPER)
    total = 1e-2 + sum(g[0] ** 2 for g in grads)
    np.testing.assert_allclose(directions[-1], grads[-1] / np.sqrt(total), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rmsprop", "adam"])
@pytest.mark.parametrize("normalize", [False, True])
@given(seed=seeds)
def test_06_graft_norms(kind, normalize, seed):
    """||u|| is the norm of the graft's own step, over the parameter or over every block."""
    grads = [dense((5, 3), (seed, j)) for j in range(3)]
    layout = kj.Layout(block_size=3, merge="none", pieces="tail", vectors="block")
    pieces = {"parameter": [np.s_[:]], "block": [np.s_[:3], np.s_[3:]]}
    for per, parts in pieces.items():
        graft = kj.Graft(kind, beta2=0.9, eps=1e-3, per=per, normalize=normalize)
        ours, _ = trajectory(SHAMPOO, grads, graft=graft, **PAPER | {"layout": layout})
        theirs = graft_step(grads, kind, normalize)
        for part in parts:
            expected = np.linalg.norm(theirs[part])
            np.testing.assert_allclose(np.linalg.norm(ours[-1][part]), expected, rtol=1e-9)


def graft_step(grads, kind, normalize):
    """Last step of the grafting method, in numpy."""
    v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, start=1):
        x = g / np.linalg.norm(g) if normalize else g
        v = v + x * x if kind == "adagrad" else 0.9 * v + 0.1 * x * x
        second = v / (1 - 0.9**t) if kind == "adam" else v
    return x if kind == "sgd" else x / (np.sqrt(second) + 1e-3)


@given(seed=seeds)
def test_06_blocks_are_separate_parameters_when_norms_are_per_block(seed):
    layout = kj.Layout(block_size=3, merge="none", pieces="tail", vectors="block")
    options = PAPER | {"layout": layout, "graft": kj.Graft("adam", per="block")}
    grads = [dense((5, 3), (seed, j)) for j in range(4)]
    whole, _ = trajectory(SHAMPOO, grads, **options)
    for piece in (np.s_[:3], np.s_[3:]):
        alone, _ = trajectory(SHAMPOO, [g[piece] for g in grads], **options)
        np.testing.assert_allclose(whole[-1][piece], alone[-1], rtol=1e-10, atol=1e-14)


@functools.cache
def roots(p):
    newton = jax.jit(lambda a: inverse_root(a, p, 0.0, tolerance=1e-12)[0])
    exact = jax.jit(lambda a: symmetric_power(a, -1.0 / p, 0.0))
    return newton, exact


@pytest.mark.parametrize("p", [2, 4])
@given(seed=seeds)
def test_08_newton_and_eigh_agree_at_condition_1e8(p, seed):
    rng = np.random.default_rng(seed)
    w = 10 ** rng.uniform(-8, 0, 6)
    w[:2] = 1.0, 1e-8
    q = orthogonal(6, seed)
    a = (q * w) @ q.T
    newton, exact = (np.asarray(f((a + a.T) / 2)) for f in roots(p))
    assert relative(newton, exact) < 1e-8


@pytest.mark.parametrize("fold", [1, 3])
@given(grads=streams([(4, 3)], steps=6), beta2=st.sampled_from([1.0, 0.9]))
def test_square_root_statistics_are_the_gram_statistics(fold, grads, beta2):
    """R^T R = S in the immediate and the delayed form, whose updates are those of the Gram form."""
    options = PAPER | {"initial": 1e-2, "beta2": beta2}
    gram, states = trajectory(SHAMPOO, grads, **options)
    other, roots = trajectory(SHAMPOO, grads, statistics=kj.SquareRoot(fold_every=fold), **options)
    ours, theirs = (array_form(factors(roots[-1])[0]), factors(states[-1])[0])
    for s, t in zip(ours, theirs, strict=True):  # after 6 steps nothing is pending
        np.testing.assert_allclose(s, t, rtol=1e-10, atol=1e-12)
    for u, v in zip(other, gram, strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-7, atol=1e-9)


@given(seed=seeds)
def test_exponent_override(seed):
    grads = [dense((4, 3), (seed, j)) for j in range(3)]
    _, states = trajectory(SHAMPOO, grads, exponent=0.5, **PAPER)
    for s, p in zip(*factors(states[-1]), strict=True):
        assert relative(p, power(np.linalg.inv(s), 0.5)) < 1e-8
