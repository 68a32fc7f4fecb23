"""SOAP as a transformation (soap.md section 6, numbers in the names; sections 5 and 3.1)."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import kradagrad_jax as kj
from tests.properties.draws import BLOCKS, arrays, dense, orthogonal, trajectory

SOAP = kj.scale_by_soap
OFFICIAL = {"preset": "official", "layout": BLOCKS, "refresh_every": 1}
seeds = st.integers(0, 2**32 - 1)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def stream(shape, seed, steps=6):
    return [dense(shape, (seed, j)) for j in range(steps)]


def bases(state):
    (factor,) = state.factors.values()
    return [None if q is None else np.asarray(q[0]) for q in factor.bases]


@pytest.mark.parametrize("options", [OFFICIAL | {"eps": 0.0}, {"layout": BLOCKS}], ids=str)
@given(seed=seeds, power=st.sampled_from([-20, 20]))
def test_01_scale_invariance(options, seed, power):
    """Powers of two leave every bit as it is."""
    grads = stream((4, 4), seed)
    plain, _ = trajectory(SOAP, grads, **options)
    other, _ = trajectory(SOAP, [2.0**power * g for g in grads], **options)
    for u, v in zip(plain, other, strict=True):
        np.testing.assert_array_equal(u, v)


@pytest.mark.parametrize("basis", ["qr", "eigh"])
@given(seed=seeds)
def test_02_orthogonal_equivariance(basis, seed):
    left, right = orthogonal(4, seed), orthogonal(4, seed + 1)
    grads, options = stream((4, 4), seed), OFFICIAL | {"basis": basis}
    plain, _ = trajectory(SOAP, grads, **options)
    turned, _ = trajectory(SOAP, [left @ g @ right.T for g in grads], **options)
    flipped, _ = trajectory(SOAP, [g.T for g in grads], **options)
    for u, v, w in zip(plain[1:], turned[1:], flipped[1:], strict=True):
        assert relative(v, left @ u @ right.T) < 1e-6
        assert relative(w, u.T) < 1e-6


@given(seed=seeds)
def test_03_a_repeated_gradient_gives_the_polar_factor(seed):
    g = dense((4, 4), seed) + 3 * orthogonal(4, seed)
    directions, _ = trajectory(SOAP, [g] * 30, **OFFICIAL)
    u, _, vt = np.linalg.svd(g)
    assert relative(directions[-1], u @ vt) < 1e-3


@given(seed=seeds)
def test_04_nothing_rotated_is_adam_without_its_first_gradient(seed):
    """Both on parameters without factors, and as the limit of one-sided blocks."""
    grads, b = stream((4, 3), seed), 0.95
    layout = kj.Layout(block_size=None, merge="none", max_dim=2)
    ours, states = trajectory(SOAP, grads, **OFFICIAL | {"layout": layout})
    assert not states[-1].factors
    m = v = np.zeros((4, 3))
    for t, g in enumerate(grads[1:], 1):
        m, v = b * m + (1 - b) * g, b * v + (1 - b) * g * g
        u = m / (np.sqrt(v) + 1e-8) * np.sqrt(1 - b**t) / (1 - b**t)
        np.testing.assert_allclose(ours[t], u, rtol=1e-12)
    assert not np.any(ours[0])


@given(seed=seeds)
def test_04_one_side_alone(seed):
    """A mode without a factor is not rotated: Adam in ``Q^T G``."""
    grads = stream((4, 6), seed)
    layout = kj.Layout(block_size=None, merge="none", modes=(True, False))
    ours, states = trajectory(SOAP, grads, **OFFICIAL | {"layout": layout, "refresh_every": 100})
    q, none = bases(states[-1])
    assert none is None
    m = v = np.zeros((4, 6))
    for t, g in enumerate(grads[1:], 1):
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * (q.T @ g) ** 2
        c = np.sqrt(1 - 0.95**t) / (1 - 0.95**t)
        np.testing.assert_allclose(ours[t], c * q @ (q.T @ m / (np.sqrt(v) + 1e-8)), rtol=1e-9)


@pytest.mark.parametrize("preset", ["recommended", "official"])
def test_05_the_first_call_makes_no_step(preset):
    directions, states = trajectory(SOAP, stream((4, 3), 0, 2), preset=preset)
    assert not np.any(directions[0])
    assert np.any(directions[1])
    (factor,) = states[1].factors.values()
    assert not np.any(factor.mean)
    assert not np.any(factor.squares)
    assert kj.diagnostics(states[-1])["rejected"] == 0


@pytest.mark.parametrize("basis", ["qr", "eigh", "tracked"])
@given(grads=st.lists(arrays((4, 3)), min_size=8, max_size=8), every=st.sampled_from([1, 3]))
def test_06_09_bases_are_orthogonal_and_change_at_refreshes_alone(basis, grads, every):
    grads[0] = grads[0] + np.eye(4, 3)
    options = OFFICIAL | {"basis": basis, "refresh_every": every}
    directions, states = trajectory(SOAP, grads, **options)
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        for old, new in zip(bases(before), bases(after), strict=True):
            defect = np.abs(new.T @ new - np.eye(len(new))).max()
            assert defect < (0.2 if basis == "tracked" else 1e-12)  # tracking restores later
            if t % every:
                np.testing.assert_array_equal(old, new)
    assert all(np.isfinite(u).all() for u in directions)


@pytest.mark.parametrize("basis", ["qr", "eigh", "tracked"])
def test_06_bases_come_to_be_eigenvectors(basis):
    """Of a statistic that stands still, whatever the kind of refresh."""
    g = orthogonal(5, 0) * [5.0, 4.0, 3.0, 2.0, 1.0]
    noise = [g @ orthogonal(5, j) for j in range(40)]  # G G^T is the same for all
    _, states = trajectory(SOAP, noise, **OFFICIAL | {"basis": basis})
    (factor,), q = states[-1].factors.values(), bases(states[-1])[0]
    inner = q.T @ np.asarray(factor.statistics[0][0]) @ q
    assert np.abs(inner - np.diag(np.diagonal(inner))).max() < 1e-8 * inner[0, 0]


@pytest.mark.parametrize(("beta2", "growth"), [(0.95, 1.5), (0.9, 2.0), (0.8, np.inf)])
def test_08_no_growth_when_gradients_stop(beta2, growth):
    grads = stream((4, 4), 0, 20) + [np.zeros((4, 4))] * 400
    directions, _ = trajectory(SOAP, grads, **OFFICIAL | {"beta2": beta2, "eps": 0.0})
    sizes = [np.sqrt(np.mean(u * u)) for u in directions]
    if np.isfinite(growth):
        assert max(sizes[20:]) < growth * max(sizes[1:20])
    else:  # what the reference warns of: b2 < b1^2
        assert max(sizes[20:]) > 100 * max(sizes[1:20])


@given(seed=seeds)
def test_10_before_the_first_basis_a_sum_of_squares_is_adagrad(seed):
    grads = stream((4, 3), seed)
    options = {"preset": "basis_first", "beta1": 0.0, "beta2": 1.0, "layout": BLOCKS, "eps": 0.0}
    ours, _ = trajectory(SOAP, grads, timing=kj.Timing(first_refresh=100), **options)
    total = np.cumsum([g * g for g in grads], axis=0)
    for u, g, v in zip(ours, grads, total, strict=True):
        np.testing.assert_allclose(u, g / np.sqrt(v), rtol=1e-13)


@given(seed=seeds)
def test_a_first_refresh_that_is_put_off(seed):
    """Until then Adam in coordinates; then squares turn once: their sum over the block is kept."""
    grads, timing = stream((4, 4), seed), kj.Timing(first_refresh=4)
    ours, states = trajectory(SOAP, grads, **OFFICIAL | {"timing": timing, "refresh_every": 100})
    m, v = (0.05 * grads[1], 0.05 * grads[1] ** 2)
    np.testing.assert_allclose(ours[1], m / (np.sqrt(v) + 1e-8) / np.sqrt(0.05), rtol=1e-9)
    sums = [float(jnp.sum(s.factors["4x4"].squares)) for s in states[3:5]]
    g = grads[3]
    np.testing.assert_allclose(sums[1], 0.95 * sums[0] + 0.05 * np.sum(g * g), rtol=1e-12)
    assert kj.diagnostics(states[-1])["rejected"] == 0


@pytest.mark.parametrize("tolerance", [0.0, 0.9])
@pytest.mark.parametrize("basis", ["qr", "eigh"])
def test_a_basis_that_is_good_enough_is_kept(basis, tolerance):
    """Eigenvalue correction: within the tolerance the statistic counts as diagonal."""
    options = {"preset": "basis_first", "basis": basis, "layout": BLOCKS}
    _, states = trajectory(SOAP, stream((4, 4), 0), tolerance=tolerance, **options)
    off = bases(states[-1])[0]
    moved = np.abs(off.T @ off - np.eye(4)).max() < 1e-12 and not np.isin(off, [0, 1]).all()
    assert moved == (tolerance == 0.0)


# Float32 with null directions (section 5): dead inputs, gradients in a fixed subspace.
N, DEAD = 32, 8


@functools.cache
def updates(options):
    tx = SOAP(layout=BLOCKS, **dict(options))
    return tx, jax.jit(tx.update)


def single(grads, **options):
    """Directions of float32 gradients from the third on: the first has no basis yet."""
    tx, update = updates(tuple(options.items()))
    state, out = tx.init({"p": jnp.zeros(grads[0].shape, jnp.float32)}), []
    for g in grads:
        u, state = update({"p": jnp.asarray(g, jnp.float32)}, state)
        out.append(np.asarray(u["p"], np.float64))
    return np.stack(out[2:])


def rms(x):
    return float(np.sqrt(np.mean(x * x)))


def dead_rows(scale, steps=40):
    grads = scale * np.random.default_rng(0).normal(size=(steps, N, N))
    grads[:, :DEAD] = grads[:, :, -DEAD:] = 0
    return list(grads)


@pytest.mark.parametrize("basis", ["qr", "eigh", "tracked"])
@pytest.mark.parametrize("scale", [1e2, 1.0, 1e-4])
def test_07_dead_rows_stay_where_they_are_in_float32(basis, scale):
    u = single(dead_rows(scale), basis=basis)
    live = rms(u[:, DEAD:, :-DEAD])
    assert live > 0.1
    dead = max(np.abs(u[:, :DEAD]).max(), np.abs(u[:, :, -DEAD:]).max())
    assert dead < 1e-3 * live


def test_07_dead_rows_move_without_the_mask():
    """The table's first row: the tests above and below can fail."""
    u = single(dead_rows(1.0), preset="official")
    assert max(rms(x) for x in u[:, :DEAD]) > 0.05


def test_07_a_fixed_subspace_is_not_left():
    rng = np.random.default_rng(0)
    span = orthogonal(N, 1)[:, :4]
    grads = [span @ rng.normal(size=(4, 4)) @ span.T for _ in range(40)]
    outside = np.eye(N) - span @ span.T

    def share(u):
        return rms(outside @ u) / rms(u)

    assert share(single(grads)) < 1e-3
    assert share(single(grads, preset="official")) > 0.1


def test_07_a_repeated_gradient_keeps_its_length():
    """||u|| = ||UV^T|| with the relative epsilon; the official one is several times too long."""
    g = dense((N, N), 0)
    lengths = [
        np.linalg.norm(single([g] * 40, **options)[-1]) / np.sqrt(N)
        for options in ({}, {"preset": "official"})
    ]
    assert abs(lengths[0] - 1) < 0.1
    assert lengths[1] > 2


@pytest.mark.parametrize("spread", [3.0, 1e2])
def test_the_mask_costs_honest_directions_nothing(spread):
    """Full rank with this spread of singular values: with and without it the same step."""
    values = np.geomspace(1, 1 / spread, N)
    rng, left = np.random.default_rng(0), orthogonal(N, 1)
    grads = [left * values @ rng.normal(size=(N, N)) for _ in range(30)]
    with_mask, without = (single(grads, mask=mask) for mask in (True, False))
    np.testing.assert_array_equal(with_mask, without)
