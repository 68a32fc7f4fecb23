"""KrADagrad* and KrADagrad as transformations (kradagrad.md section 6.1)."""

import itertools

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import kradagrad_jax as kj
from kradagrad_jax.factors.krad import scheduled_mode
from tests.properties.draws import (
    WHOLE,
    arrays,
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
BOUNDS = ["sym", "fro", "trace", "spectral", "official"]
METHODS = [kj.scale_by_kradagrad_star, kj.scale_by_kradagrad]
seeds = st.integers(0, 2**32 - 1)
over_bounds = pytest.mark.parametrize("bound", BOUNDS)
over_methods = pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__[9:])


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("bound", ["sym", "trace"])
@given(seed=seeds, eps=st.sampled_from([1e-2, 1.0]))
def test_04_rank_one_gradients_equal_shampoo(bound, seed, eps):
    """P = (eps I + sum G G^T)^(-1/4), as Shampoo's with the same start."""
    rng = np.random.default_rng(seed)
    grads = [np.outer(rng.normal(size=4), rng.normal(size=3)) for _ in range(6)]
    ours, states = trajectory(
        kj.scale_by_kradagrad_star, grads, bound=bound, initial=1 / eps, **PAPER
    )
    theirs, others = trajectory(kj.scale_by_shampoo, grads, initial=eps, **PAPER)
    assert relative(ours[-1], theirs[-1]) < 1e-9
    for p, q in zip(factors(states[-1])[1], factors(others[-1])[1], strict=True):
        assert relative(p, q) < 1e-9


@pytest.mark.parametrize("bound", ["sym", "trace", "spectral"])
@given(seed=seeds)
def test_05_a_vector_is_full_matrix_adagrad(bound, seed):
    grads = [dense((5,), (seed, j)) for j in range(5)]
    directions, _ = trajectory(kj.scale_by_kradagrad_star, grads, bound=bound, **PAPER)
    total = np.eye(5) + sum(np.outer(g, g) for g in grads)
    assert relative(directions[-1], power(np.linalg.inv(total), 0.5) @ grads[-1]) < 1e-9


@over_bounds
@given(grads=streams([(1,)], steps=5))
def test_06_one_number_is_adagrad(bound, grads):
    directions, _ = trajectory(kj.scale_by_kradagrad_star, grads, bound=bound, initial=4.0, **PAPER)
    total = 0.25 + sum(g[0] ** 2 for g in grads)
    np.testing.assert_allclose(directions[-1], grads[-1] / np.sqrt(total), rtol=1e-10, atol=1e-300)


@over_methods
@over_bounds
@given(seed=seeds)
def test_07_orthogonal_equivariance(method, bound, seed):
    left, right = orthogonal(4, seed), orthogonal(3, seed + 1)
    grads = [dense((4, 3), (seed, j)) for j in range(4)]
    plain, _ = trajectory(method, grads, bound=bound, **PAPER)
    turned, _ = trajectory(method, [left @ g @ right.T for g in grads], bound=bound, **PAPER)
    for u, v in zip(plain, turned, strict=True):
        assert relative(v, left @ u @ right.T) < 1e-9


@over_bounds
@given(grads=streams([(4, 3)]))
def test_07_transposition(bound, grads):
    """KrADagrad* treats rows and columns alike."""
    plain, _ = trajectory(kj.scale_by_kradagrad_star, grads, bound=bound, **PAPER)
    other, _ = trajectory(kj.scale_by_kradagrad_star, [g.T for g in grads], bound=bound, **PAPER)
    for u, v in zip(plain, other, strict=True):
        np.testing.assert_allclose(v, u.T, rtol=1e-9, atol=1e-12)


@over_bounds
@given(grads=streams([(4, 3)]), factor=st.sampled_from([1e-3, 1e4]))
def test_08_scale(bound, grads, factor):
    """G -> cG and init -> init / c^2 leave the updates as they are."""
    method = kj.scale_by_kradagrad_star
    plain, _ = trajectory(method, grads, bound=bound, **PAPER)
    scaled = [factor * g for g in grads]
    other, _ = trajectory(method, scaled, bound=bound, initial=factor**-2, **PAPER)
    for u, v in zip(plain, other, strict=True):
        np.testing.assert_allclose(v, u, rtol=1e-8, atol=1e-10)


@over_methods
@given(grads=streams([(4, 3)]), factor=st.sampled_from([1e-6, 1e6]))
def test_08_the_recommended_start_follows_the_scale(method, grads, factor):
    options = {"beta1": "none", "graft": "none", **WHOLE}
    plain, _ = trajectory(method, grads, **options)
    other, _ = trajectory(method, [factor * g for g in grads], **options)
    if np.abs(grads[0]).max() > 1e-3:
        for u, v in zip(plain, other, strict=True):
            np.testing.assert_allclose(v, u, rtol=1e-7, atol=1e-7)


@over_methods
@over_bounds
def test_09_zero_gradients_leave_the_statistics(method, bound):
    grads = [dense((4, 3), 0), np.zeros((4, 3)), np.zeros((4, 3))]
    _, states = trajectory(method, grads, bound=bound, **PAPER)
    for before, after in zip(factors(states[1])[0], factors(states[3])[0], strict=True):
        np.testing.assert_array_equal(after, before)


@over_methods
@given(seed=seeds)
def test_10_blocks_are_separate_parameters(method, seed):
    """Without grafting, a cut matrix moves as its pieces would alone."""
    cut = kj.Layout(block_size=3, merge="none", pieces="tail", vectors="block")
    options = PAPER | {"layout": cut}
    grads = [dense((5, 3), (seed, j)) for j in range(4)]
    whole, _ = trajectory(method, grads, **options)
    for piece in (np.s_[:3], np.s_[3:]):
        alone, _ = trajectory(method, [g[piece] for g in grads], **options)
        for u, v in zip(whole, alone, strict=True):
            np.testing.assert_allclose(u[piece], v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (2, 3, 2), (5,)], ids=str)
def test_10_only_the_scheduled_mode_changes(shape):
    """The official schedule: every mode in turn for k^2 steps, then mostly the largest one."""
    k, steps = len(shape), 20
    grads = [dense(shape, j) for j in range(steps)]
    _, states = trajectory(kj.scale_by_kradagrad, grads, **PAPER)
    for c, (before, after) in enumerate(itertools.pairwise(states), start=1):
        s = c - 1
        rest = s - int(np.sqrt(s)) ** 2
        largest = int(np.argmax(shape))
        mode = s % k if s < k * k else rest if rest < k else largest
        assert int(scheduled_mode(jnp.int32(c), shape)) == mode
        pairs = zip(factors(before)[0], factors(after)[0], strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if np.any(a != b)] == [mode]


@given(seed=seeds, bound=st.sampled_from(["fro", "sym"]))
def test_11_domination_of_the_full_matrix(seed, bound):
    """R^(-1/2) kron L^(-1/2) >= sum vec(G) vec(G)^T / (min(m, n) sqrt(t_L t_R)) for KrADagrad*."""
    m, n = 4, 3
    grads = [dense((m, n), (seed, j)) for j in range(6)]
    _, states = trajectory(kj.scale_by_kradagrad_star, grads, bound=bound, **PAPER)
    t = np.ones(2)
    for g, state in zip(grads, states, strict=False):
        for i, (x, u) in enumerate(zip(factors(state)[0], (g, g.T), strict=True)):
            inner = u.T @ x @ u if bound == "sym" else x @ u @ u.T
            t[i] = max(t[i], 1 + np.linalg.norm(inner))
    rows, columns = factors(states[-1])[0]
    full = sum(np.outer(g.T.ravel(), g.T.ravel()) for g in grads)
    both = np.kron(power(np.linalg.inv(columns), 0.5), power(np.linalg.inv(rows), 0.5))
    gap = both - full / (min(m, n) * np.sqrt(t.prod()))
    assert smallest(gap, spectrum(both)[-1]) > -1e-12


@given(seed=seeds)
def test_11_domination_alternating(seed):
    """R^-1 kron L^-1 >= sum vec(G) vec(G)^T / (max(m, n) t), t the largest one used."""
    m, n = 4, 3
    grads = [dense((m, n), (seed, j)) for j in range(6)]
    _, states = trajectory(kj.scale_by_kradagrad, grads, **PAPER)
    t = 1.0
    for c, (g, state) in enumerate(zip(grads, states, strict=False), start=1):
        mode = int(scheduled_mode(jnp.int32(c), (m, n)))
        stats, roots = factors(state)
        u = g @ roots[1] if mode == 0 else (roots[0] @ g).T
        t = max(t, 1 + np.linalg.norm(stats[mode] @ u @ u.T))
    rows, columns = factors(states[-1])[0]
    full = sum(np.outer(g.T.ravel(), g.T.ravel()) for g in grads)
    both = np.kron(np.linalg.inv(columns), np.linalg.inv(rows))
    assert smallest(both - full / (max(m, n) * t), spectrum(both)[-1]) > -1e-12


@over_methods
@over_bounds
@given(grads=streams([(4, 3)], steps=6))
def test_12_trace_bound(method, bound, grads):
    """tr(L^-1) <= m + 2 m (number of updates) for gradients of norm at most 1."""
    if bound == "official":
        return
    grads = [g / max(np.linalg.norm(g, 2), 1.0) for g in grads]
    _, states = trajectory(method, grads, bound=bound, **PAPER)
    for x in factors(states[-1])[0]:
        m = len(x)
        assert np.trace(np.linalg.inv(x)) <= m + 2 * m * len(grads) + 1e-9


@pytest.mark.parametrize("form", ["factored", "exact", "delayed"])
@given(seed=seeds)
def test_forms_of_one_method(form, seed):
    """Rank-one gradients: the exact and the delayed form equal the direct one; all are bounded."""
    rng = np.random.default_rng(seed)
    grads = [np.outer(rng.normal(size=4), rng.normal(size=3)) for _ in range(5)]
    direct, _ = trajectory(kj.scale_by_kradagrad_star, grads, bound="trace", **PAPER)
    other, states = trajectory(kj.scale_by_kradagrad_star, grads, form=form, **PAPER)
    if form != "factored":
        assert relative(other[-1], direct[-1]) < 1e-8
    for s in factors(states[-1])[0]:
        x = s if form == "delayed" else s @ s.T
        assert spectrum(x)[0] > 0
        assert spectrum(x)[-1] <= 1 + 1e-12


@given(u=arrays((4, 3)))
def test_exact_form_is_the_exact_inverse(u):
    _, states = trajectory(
        kj.scale_by_kradagrad_star, [u, u, u], form="exact", initial=2.0, **PAPER
    )
    for k, a in zip(factors(states[-1])[0], (u @ u.T, u.T @ u), strict=True):
        total = 0.5 * np.eye(len(a)) + 3 * a
        assert np.abs(k @ k.T @ total - np.eye(len(a))).max() < 1e-9
