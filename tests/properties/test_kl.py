"""KL-Shampoo and KL-SOAP as transformations (kl_shampoo.md section 6, numbers in the names)."""

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

KL, KL_SOAP = kj.scale_by_kl_shampoo, kj.scale_by_kl_soap
OURS = {"layout": BLOCKS, "refresh_every": 1}
OFFICIAL = OURS | {"preset": "official"}
seeds = st.integers(0, 2**32 - 1)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def rms(x):
    return float(np.sqrt(np.mean(x * x)))


def stream(shape, seed, steps=6, scale=1.0):
    return [scale * dense(shape, (seed, j)) for j in range(steps)]


def field(state, name):
    (factor,) = state.factors.values()
    return [None if x is None else np.asarray(x[0]) for x in getattr(factor, name)]


@pytest.mark.parametrize("scale_by", [KL, KL_SOAP], ids=["kl_shampoo", "kl_soap"])
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3)], ids=str)
@given(seed=seeds, factor=st.sampled_from([1e-6, 2.0**10, 1e3]))
def test_01_scale_invariance_of_the_recommended_start(scale_by, shape, seed, factor):
    options = {**OURS, "eps": 0.0}
    plain, _ = trajectory(scale_by, stream(shape, seed), **options)
    other, _ = trajectory(scale_by, stream(shape, seed, scale=factor), **options)
    for u, v in zip(plain[1:], other[1:], strict=True):
        assert relative(v, u) < 1e-7


def test_01_the_official_start_depends_on_the_unit():
    """The scale trap: with gradients of 1e-3 steps are far too short for hundreds of calls."""
    sizes = {
        scale: [rms(u) for u in trajectory(KL, stream((8, 8), 0, 60, scale), **OFFICIAL)[0]]
        for scale in (1.0, 1e-3)
    }
    assert sizes[1e-3][-1] < 0.05 * sizes[1.0][-1]
    ours = [rms(u) for u in trajectory(KL, stream((8, 8), 0, 60, 1e-3), **OURS)[0]]
    assert 0.5 < ours[-1] / sizes[1.0][-1] < 2


@pytest.mark.parametrize("scale_by", [KL, KL_SOAP], ids=["kl_shampoo", "kl_soap"])
@given(seed=seeds)
def test_02_orthogonal_equivariance(scale_by, seed):
    left, right, grads = orthogonal(4, seed), orthogonal(4, seed + 1), stream((4, 4), seed)
    plain, _ = trajectory(scale_by, grads, **OURS)
    turned, _ = trajectory(scale_by, [left @ g @ right.T for g in grads], **OURS)
    flipped, _ = trajectory(scale_by, [g.T for g in grads], **OURS)
    for u, v, w in zip(plain[1:], turned[1:], flipped[1:], strict=True):
        assert relative(v, left @ u @ right.T) < 1e-6
        assert relative(w, u.T) < 1e-6


@given(seed=seeds)
def test_03_a_repeated_gradient_gives_a_multiple_of_the_polar_factor(seed):
    g = dense((4, 4), seed) + 3 * orthogonal(4, seed)
    directions, _ = trajectory(KL, [g] * 700, **OURS, shampoo_beta=0.9)
    u, _, vt = np.linalg.svd(g)
    step = directions[-1]
    assert relative(step / np.linalg.norm(step), u @ vt / 2) < 1e-5


@pytest.mark.parametrize("scale_by", [KL, KL_SOAP], ids=["kl_shampoo", "kl_soap"])
@pytest.mark.parametrize("preset", ["recommended", "official"])
def test_05_the_first_call_makes_no_step(scale_by, preset):
    directions, states = trajectory(scale_by, stream((4, 3), 0, 2), preset=preset)
    assert not np.any(directions[0])
    assert np.any(directions[1])
    assert not np.any(states[1].factors["4x3"].mean)
    assert kj.diagnostics(states[-1])["rejected"] == 0


def test_06_the_fit_is_stationary_and_near_in_divergence():
    """Gaussian gradients A^(1/2) Z B^(1/2): the product of the eigenvalues is that of A kron B."""
    rng, m, n = np.random.default_rng(0), 6, 4
    a, b = (np.geomspace(1, 1 / 30, k) for k in (m, n))
    left, right = orthogonal(m, 1), orthogonal(n, 2)
    grads = [
        left @ (np.sqrt(a)[:, None] * rng.normal(size=(m, n)) * np.sqrt(b)) @ right.T
        for _ in range(1500)
    ]
    options = OURS | {"shampoo_beta": 0.995, "beta1": 0.0}
    _, states = trajectory(KL, grads, **options)
    q, w, s = (field(states[-1], name) for name in ("bases", "scales", "statistics"))
    for i in range(2):  # scales and statistics agree: they are averages of the same thing
        np.testing.assert_allclose(np.diagonal(q[i].T @ s[i] @ q[i]), w[i] ** -2, rtol=0.1)
    fit = np.kron((q[0] * w[0] ** -2) @ q[0].T, (q[1] * w[1] ** -2) @ q[1].T)
    true = np.kron((left * a) @ left.T, (right * b) @ right.T)
    inside = np.linalg.solve(fit, true)
    divergence = 0.5 * (np.trace(inside) - m * n - np.linalg.slogdet(inside)[1]) / (m * n)
    assert 0 <= divergence < 0.005


@given(seed=seeds)
def test_07_one_mode_averages_squares_in_its_basis(seed):
    grads = stream((5,), seed)
    _, states = trajectory(KL, grads, **OURS | {"refresh_every": 100, "cap_rule": "none"})
    (q,), (w,) = field(states[-1], "bases"), field(states[-1], "scales")
    eigenvalues = np.full(5, np.mean(grads[0] ** 2))
    for g in grads[1:]:
        eigenvalues = 0.98 * eigenvalues + 0.02 * (q.T @ g) ** 2
    np.testing.assert_allclose(w**-2, eigenvalues, rtol=1e-10)


@given(seed=seeds)
def test_08_kl_soap_in_the_basis_of_the_identity_is_adam(seed):
    """Before the first basis; without bias correction and its first gradient."""
    grads = stream((4, 3), seed)
    options = OFFICIAL | {"timing": kj.Timing(first_refresh=100), "beta2": 0.95}
    ours, _ = trajectory(KL_SOAP, grads, **options)
    m = v = np.zeros((4, 3))
    for u, g in zip(ours[1:], grads[1:], strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        np.testing.assert_allclose(u, m / (np.sqrt(v) + 1e-8), rtol=1e-11)


@given(grads=st.lists(arrays((4, 3)), min_size=7, max_size=7), every=st.sampled_from([1, 3]))
def test_09_caps_and_refreshes(grads, every):
    """w <= cap; S symmetric, not negative; orthogonal bases change at refreshes alone."""
    grads[0] = grads[0] + np.eye(4, 3)
    directions, states = trajectory(KL, grads, **OURS | {"refresh_every": every, "cap": 1.5})
    assert all(np.isfinite(u).all() for u in directions)
    assert kj.diagnostics(states[-1])["rejected"] == 0
    start = np.mean(grads[0] ** 2) ** -0.25
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        assert all(w.max() <= 1.5 * start * (1 + 1e-12) for w in field(after, "scales"))
        for s in field(after, "statistics"):
            assert np.abs(s - s.T).max() <= 1e-14 * np.abs(s).max()
            assert np.linalg.eigvalsh(s)[0] > -1e-14 * np.abs(s).max()
        for old, new in zip(field(before, "bases"), field(after, "bases"), strict=True):
            assert np.abs(new.T @ new - np.eye(len(new))).max() < 1e-12
            if t % every:
                np.testing.assert_array_equal(old, new)


@given(seed=seeds)
def test_one_side_alone_is_the_inverse_root_of_one_statistic(seed):
    """A mode without a factor neither whitens nor scales: the other one holds all of the scale."""
    grads, b = stream((3, 8), seed, 40), 0.9
    layout = kj.Layout(block_size=None, merge="none", modes=(True, False))
    options = {"layout": layout, "refresh_every": 1, "beta1": 0.0, "shampoo_beta": b}
    ours, states = trajectory(KL, grads, **options)
    _, none = field(states[-1], "bases")
    assert none is None
    s = (1 - b) * grads[0] @ grads[0].T / 8
    for g in grads[1:]:
        s = b * s + (1 - b) * g @ g.T / 8
    np.testing.assert_allclose(field(states[-1], "statistics")[0], s, rtol=1e-9, atol=1e-12)
    w = field(states[-1], "used")[0]
    expected = q_before(states) * w @ (q_before(states).T @ grads[-1])
    np.testing.assert_allclose(ours[-1], expected, rtol=1e-6)


def q_before(states):
    """The basis that the last direction was made in."""
    return field(states[-2], "bases")[0]


def test_a_long_silence():
    """3000 zeros drive w to its cap alone, and the next step is clipped; without, it explodes."""
    grads = jnp.asarray(np.stack(stream((8, 8), 0, 100) + [np.zeros((8, 8))] * 3000))

    def after(**options):
        tx = KL(**OURS | {"refresh_every": 10} | options)
        state = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(grads[0]), grads)[0]
        return rms(np.asarray(tx.update(grads[0], state)[0]))

    assert after() <= 10 * (1 + 1e-12)
    assert after(clip="none", cap_rule="none") > 1e6
    assert after(clip="none") < 1e5


# Float32 with null directions (section 5): dead rows, gradients in a fixed subspace.
N, DEAD = 32, 8


@functools.cache
def updates(scale_by, options):
    tx = scale_by(layout=BLOCKS, **dict(options))
    return tx, jax.jit(tx.update)


def single(scale_by, grads, **options):
    """Directions of float32 gradients from the third on: the first has no basis yet."""
    tx, update = updates(scale_by, tuple(options.items()))
    state, out = tx.init({"p": jnp.zeros(grads[0].shape, jnp.float32)}), []
    for g in grads:
        u, state = update({"p": jnp.asarray(g, jnp.float32)}, state)
        out.append(np.asarray(u["p"], np.float64))
    return np.stack(out[2:])


def dead_rows(scale, steps=40):
    grads = scale * np.random.default_rng(0).normal(size=(steps, N, N))
    grads[:, :DEAD] = grads[:, :, -DEAD:] = 0
    return list(grads)


@pytest.mark.parametrize("scale_by", [KL, KL_SOAP], ids=["kl_shampoo", "kl_soap"])
@pytest.mark.parametrize("scale", [1e2, 1.0, 1e-4])
def test_04_dead_rows_stay_where_they_are_in_float32(scale_by, scale):
    u = single(scale_by, dead_rows(scale))
    live = rms(u[:, DEAD:, :-DEAD])
    assert live > 0.1
    dead = max(np.abs(u[:, :DEAD]).max(), np.abs(u[:, :, -DEAD:]).max())
    assert dead < 1e-3 * live


def test_04_the_official_kl_shampoo_is_clean_without_a_mask_and_kl_soap_is_not():
    clean, other = (single(s, dead_rows(1.0), preset="official") for s in (KL, KL_SOAP))
    assert rms(clean[:, :DEAD]) < 1e-4
    assert max(rms(x) for x in other[:, :DEAD]) > 0.02


@pytest.mark.parametrize("scale_by", [KL, KL_SOAP], ids=["kl_shampoo", "kl_soap"])
def test_04_a_fixed_subspace_is_not_left(scale_by):
    rng, span = np.random.default_rng(0), orthogonal(N, 1)[:, :4]
    u = single(scale_by, [span @ rng.normal(size=(4, 4)) @ span.T for _ in range(40)])
    assert rms((np.eye(N) - span @ span.T) @ u) < 1e-3 * rms(u)


@pytest.mark.parametrize("spread", [3.0, 1e2, 1e4])
def test_float32_is_as_good_as_float64(spread):
    """Full rank, with this spread of singular values shared out to both sides; SOAP loses more."""
    roots, rng = np.sqrt(np.geomspace(1, 1 / spread, N)), np.random.default_rng(0)
    left, right = orthogonal(N, 1) * roots, orthogonal(N, 2) * roots
    grads = [left @ rng.normal(size=(N, N)) @ right.T for _ in range(40)]
    errors = [
        relative(single(s, grads)[-1], trajectory(s, grads, layout=BLOCKS)[0][-1])
        for s in (KL, kj.scale_by_soap)
    ]
    assert errors[0] < 1e-3
    assert errors[0] < errors[1]
