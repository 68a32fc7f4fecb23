"""Ginger (ginger.md section 6, numbers in the names): one span, then the transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.linalg.spans import Span, fold, orthonormalized, solve
from kradagrad_jax.transforms.ginger import scale_by_ginger
from tests.properties.draws import orthogonal

A, C, GAMMA = 0.9, 0.1, 1e-2


@functools.cache
def jitted():
    return jax.jit(fold), jax.jit(solve)


def folded(span, rows, decay=A, weight=C):
    rows = jnp.asarray(rows, span.values.dtype)
    dtype = span.values.dtype
    return jitted()[0](span, rows, jnp.asarray(decay, dtype), jnp.asarray(weight, dtype))


def solved(span, u, gamma=GAMMA):
    dtype = span.values.dtype
    return np.asarray(jitted()[1](span, jnp.asarray(gamma, dtype), jnp.asarray(u, dtype)))


def empty(tau, d, dtype=jnp.float64):
    return Span(jnp.zeros((tau, d), dtype), jnp.zeros(tau, dtype))


def vectors(steps, d, seed=0, decades=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, d)) * np.logspace(0, -decades, d)


def matrix(span):
    u = np.asarray(span.basis, np.float64).reshape(len(span.basis), -1)
    return (u.T * np.asarray(span.values, np.float64)) @ u


def trajectory(tau, hs, dtype=jnp.float64):
    span, spans = empty(tau, hs.shape[1], dtype), []
    for h in hs:
        span = folded(span, h[None])
        spans.append(span)
    return spans


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def truncated(g, tau):
    w, v = np.linalg.eigh((g + g.T) / 2)
    return (v[:, -tau:] * np.maximum(w[-tau:], 0)) @ v[:, -tau:].T


def test_01_the_inverse_form_is_the_same_method():
    """The correction of the inverse (Sherman-Morrison), cut to tau directions, step by step."""
    d, tau = 12, 3
    span, low = empty(tau, d), np.zeros((d, d))
    for h in vectors(30, d):
        inverse = np.linalg.inv(GAMMA * np.eye(d) + A * low)
        q = inverse @ h
        inverse = inverse - np.outer(q, q) * C / (1 + C * q @ h)
        w, v = np.linalg.eigh(np.eye(d) / GAMMA - inverse)
        w, v = w[-tau:], v[:, -tau:]
        low = (v * (GAMMA**2 * w / (1 - GAMMA * w))) @ v.T
        span = folded(span, h[None])
        assert relative(matrix(span), low) < 1e-9


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["f64", "f32"])
def test_02_orthonormal_for_long(dtype):
    eps = float(jnp.finfo(dtype).eps)
    rng = np.random.default_rng(0)
    hs = rng.normal(size=(2000, 3)) @ rng.normal(size=(3, 30))  # true rank below tau
    hs[::3] += 1e-6 * rng.normal(size=(667, 30))

    decay, weight = jnp.asarray(A, dtype), jnp.asarray(C, dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def run(rows, polish):
        def block(span, rows):
            span, _ = jax.lax.scan(lambda s, h: (fold(s, h[None], decay, weight), None), span, rows)
            return span._replace(basis=orthonormalized(span.basis)) if polish else span, None

        return jax.lax.scan(block, empty(5, 30, dtype), rows.reshape(-1, 50, 30))[0]

    for polish, bound in ((False, 1000), (True, 60)):
        span = run(jnp.asarray(hs, dtype), polish)
        u, live = np.asarray(span.basis), np.asarray(span.values) > 0
        assert np.abs(u @ u.T - np.diag(live)).max() < bound * eps
        assert 3 <= live.sum() <= 5
        assert not u[~live].any()


@pytest.mark.parametrize(("tau", "steps", "d"), [(6, 6, 12), (8, 20, 8), (8, 20, 5)])
def test_03_exact_without_truncation(tau, steps, d):
    hs = vectors(steps, d)
    span, exact = empty(min(tau, d), d), np.zeros((d, d))
    for h in hs:
        span, exact = folded(span, h[None]), A * exact + C * np.outer(h, h)
    assert relative(matrix(span), exact) < 1e-8
    u = vectors(1, d, 9)[0]
    dense = np.linalg.solve(GAMMA * np.eye(d) + exact, u)
    assert relative(solved(span, u), dense) < 1e-7


def test_04_05_what_truncation_loses():
    """G_trunc <= G_exact; what is dropped is small; eigenvalues interlace; traces add up."""
    d, tau = 12, 3
    span, exact, bound = empty(tau, d), np.zeros((d, d)), 0.0
    for h in vectors(40, d):
        old, q = np.asarray(span.values), np.asarray(span.basis)
        new = folded(span, h[None])
        full = np.linalg.eigvalsh(A * matrix(span) + C * np.outer(h, h))[::-1]
        rest = np.sum((h - q.T @ (q @ h)) ** 2)
        assert full[tau] <= min(A * old[-1], C * rest) + 1e-13
        assert (np.asarray(new.values) >= A * old - 1e-13).all()
        total = A * old.sum() + C * h @ h
        assert abs(float(jnp.sum(new.values)) + full[tau:].sum() - total) < 1e-12 * total
        span, exact = new, A * exact + C * np.outer(h, h)
        bound = A * bound + max(full[tau], 0)
        gap = np.linalg.eigvalsh(exact - matrix(span))
        assert gap[0] > -1e-12 and gap[-1] <= bound + 1e-12


def test_06_13_14_the_operator():
    hs = vectors(20, 12)
    span = trajectory(3, hs)[-1]
    dense = np.stack([solved(span, e) for e in np.eye(12)], 1)
    np.testing.assert_allclose(dense, dense.T, atol=1e-11)
    w = np.linalg.eigvalsh(dense)
    top = float(span.values[0])
    assert abs(w[0] * (GAMMA + top) - 1) < 1e-11 and abs(w[-1] * GAMMA - 1) < 1e-11
    assert top <= max(h @ h for h in hs)
    for u, value in zip(np.asarray(span.basis), np.asarray(span.values), strict=True):
        assert relative(solved(span, u), u / (GAMMA + value)) < 1e-12
    u = vectors(1, 12, 9)[0]
    lengths = [np.linalg.norm(solved(span, u, gamma)) for gamma in (1e-3, 1e-2, 1e-1, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    shift = np.linalg.norm(GAMMA * solved(span, u) - u) / np.linalg.norm(u)
    assert shift <= top / (GAMMA + top)
    np.testing.assert_allclose(solved(empty(3, 12), u), u / GAMMA, rtol=1e-15)


def test_07_08_zero_and_known_vectors():
    span = trajectory(3, vectors(10, 12))[-1]
    zero = folded(span, np.zeros((1, 12)))
    np.testing.assert_allclose(zero.values, A * np.asarray(span.values), rtol=1e-14)
    assert relative(matrix(zero), A * matrix(span)) < 1e-14
    h = np.array([0.3, -2.0, 1.0]) @ np.asarray(span.basis)
    inside = folded(span, h[None])
    assert relative(matrix(inside), A * matrix(span) + C * np.outer(h, h)) < 1e-13
    nothing = folded(empty(3, 12), np.zeros((1, 12)))
    assert not np.asarray(nothing.basis).any() and not np.asarray(nothing.values).any()


def test_09_10_11_symmetries():
    hs, u, turn = vectors(15, 10), vectors(1, 10, 9)[0], orthogonal(10, 3)
    span = trajectory(4, hs)[-1]
    plain = solved(span, u)
    scaled = trajectory(4, 30 * hs)[-1]
    np.testing.assert_allclose(scaled.values, 900 * np.asarray(span.values), rtol=1e-12)
    assert relative(900 * solved(scaled, u, 900 * GAMMA), plain) < 1e-11
    turned = trajectory(4, hs @ turn.T)[-1]
    assert relative(solved(turned, turn @ u), turn @ plain) < 1e-11
    order = np.random.default_rng(0).permutation(10)
    assert relative(solved(trajectory(4, hs[:, order])[-1], u[order]), plain[order]) < 1e-12
    flipped = span._replace(basis=span.basis * jnp.asarray([1.0, -1.0, -1.0, 1.0])[:, None])
    again = folded(flipped, hs[:1])
    assert relative(matrix(again), matrix(folded(span, hs[:1]))) < 1e-14


def test_12_several_vectors_at_once():
    d, b = 20, 5
    span = trajectory(4, vectors(10, d))[-1]
    rows = vectors(b, d, 7)
    exact = A * matrix(span) + C / b * rows.T @ rows
    joint = folded(span, rows, A, C / b)
    assert relative(matrix(joint), truncated(exact, 4)) < 1e-11
    one = span
    for j, h in enumerate(rows):
        one = folded(one, h[None], A if j == 0 else 1.0, C / b)
    assert (np.asarray(one.values) <= np.asarray(joint.values) + 1e-13).all()
    assert np.linalg.norm(exact - matrix(joint)) <= np.linalg.norm(exact - matrix(one))
    mixed = folded(span, orthogonal(b, 2) @ rows, A, C / b)
    assert relative(matrix(mixed), matrix(joint)) < 1e-12
    wide = trajectory(12, vectors(3, d))[-1]
    together, apart = folded(wide, rows, A, C / b), wide
    for j, h in enumerate(rows):
        apart = folded(apart, h[None], A if j == 0 else 1.0, C / b)
    assert relative(matrix(together), matrix(apart)) < 1e-11


@pytest.mark.parametrize("case", ["more than entries", "equal", "some zero", "tiny"])
def test_12_degenerate_columns(case):
    d = 6
    rows = vectors(9 if case == "more than entries" else 4, d, 7)
    if case == "equal":
        rows[1:] = rows[0]
    if case == "some zero":
        rows[::2] = 0
    if case == "tiny":
        rows[1] *= 1e-7
    span = trajectory(6, vectors(2, d))[-1]
    exact = A * matrix(span) + C * rows.T @ rows
    new = folded(span, rows)
    assert relative(matrix(new), exact) < 1e-8
    u = np.asarray(new.basis)
    assert np.abs(u @ u.T - np.diag(np.asarray(new.values) > 0)).max() < 1e-13


def test_tensor_rows_are_flat_rows():
    hs = vectors(6, 24)
    flat = trajectory(3, hs)[-1]
    span = Span(jnp.zeros((3, 2, 3, 4)), jnp.zeros(3))
    for h in hs:
        span = folded(span, h.reshape(1, 2, 3, 4))
    assert relative(matrix(span), matrix(flat)) < 1e-13
    u = vectors(1, 24, 9)[0]
    ours = solved(span, u.reshape(2, 3, 4))
    assert relative(ours.ravel(), solved(flat, u)) < 1e-12


@pytest.mark.parametrize("ratio", [1e2, 1e5, 1e8])
def test_float32_directions(ratio):
    """Error of the direction up to sigma / gamma = 1e8, against float64."""
    hs = vectors(30, 40, decades=1.0)
    single, double = (trajectory(6, hs, t)[-1] for t in (jnp.float32, jnp.float64))
    gamma = float(double.values[0]) / ratio
    u = vectors(1, 40, 9)[0]
    assert relative(solved(single, u, gamma), solved(double, u, gamma)) < 1e-5
    assert relative(np.asarray(single.values), np.asarray(double.values)) < 1e-5


# The transformation


def stream(n, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (4, 3), "b": (3,), "s": ()}
    return [{k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(n)]


def run(tx, grads, samples, state=None):
    update = jax.jit(tx.update)
    state = tx.init(grads[0]) if state is None else state
    out = []
    for g, s in zip(grads, samples, strict=True):
        u, state = update(g, state, curvature=s)
        out.append(u)
    return out, state


def sampled(trees, terms=1.0):
    return [Samples.from_gradients(t, terms=terms) for t in trees]


def close(a, b, rtol=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-11)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


FREE = {"clip": "none", "damping": GAMMA, "beta2": A, "rank": 8}


def test_15_16_17_19_closed_forms():
    grads, hs = stream(4), stream(4, 1)
    (first,), _ = run(scale_by_ginger(fisher="empirical", **FREE), grads[:1], [None])
    for name, g in grads[0].items():
        expected = g / (GAMMA + C * np.sum(np.square(g)))
        np.testing.assert_allclose(first[name], expected, rtol=1e-10)
    out, _ = run(scale_by_ginger(beta1="none", **FREE | {"beta2": 0.0}), grads[:1], sampled(hs[:1]))
    g, h = (np.ravel(x[0]["w"]) for x in (grads, hs))
    expected = g / GAMMA - h * (h @ g) / (GAMMA * (GAMMA + h @ h))
    np.testing.assert_allclose(np.ravel(out[0]["w"]), expected, rtol=1e-10)
    _, state = run(scale_by_ginger(**FREE), grads, sampled([hs[0]] * 4))
    values = np.asarray(state.factors["4x3"].values[0])
    assert values[0] == pytest.approx((1 - A**4) * h @ h, rel=1e-13)
    assert not values[1:].any()
    out, _ = run(scale_by_ginger(beta1="none", **FREE), grads, sampled(hs))
    v = 0.0
    for g, h, u in zip(grads, hs, out, strict=True):
        v = A * v + C * float(h["s"]) ** 2
        assert float(u["s"]) == pytest.approx(float(g["s"]) / (GAMMA + v), rel=1e-12)


def test_momentum_is_that_of_adam():
    grads, samples = stream(4), [None] * 4
    out, _ = run(scale_by_ginger(**FREE), grads, samples)
    mu = np.zeros(16)
    for t, (g, u) in enumerate(zip(grads, out, strict=True), start=1):
        mu = 0.9 * mu + 0.1 * flat(g)
        np.testing.assert_allclose(flat(u), mu / (1 - 0.9**t) / GAMMA, rtol=1e-12)


def test_clipping_is_elementwise():
    grads, samples = stream(3), sampled(stream(3, 1))
    free, _ = run(scale_by_ginger(**FREE), grads, samples)
    clipped, _ = run(scale_by_ginger(**FREE | {"clip": 5.0}), grads, samples)
    close(clipped, jax.tree.map(lambda x: jnp.clip(x, -5, 5), free))


def test_curvature_vectors_carry_the_root_of_the_batch_size():
    grads, hs = stream(3), stream(3, 1)
    scaled, _ = run(scale_by_ginger(**FREE), grads, sampled(hs, terms=9.0))
    by_hand, _ = run(
        scale_by_ginger(**FREE), grads, sampled([jax.tree.map(lambda x: 3 * x, h) for h in hs])
    )
    close(scaled, by_hand)
    by_option, _ = run(scale_by_ginger(fisher_scale=9.0, **FREE), grads, sampled(hs))
    close(by_option, by_hand)


def test_11_the_whole_model_is_one_vector():
    """One leaf: the same as per leaf; several: the exact matrix of the concatenation."""
    grads, hs = stream(5), stream(5, 1)
    alone = [{"w": g["w"]} for g in grads], sampled([{"w": h["w"]} for h in hs])
    model = scale_by_ginger(partition="model", **FREE)
    close(run(model, *alone)[0], run(scale_by_ginger(**FREE), *alone)[0])
    out, state = run(model, grads, sampled(hs))
    exact, mu = np.zeros((16, 16)), np.zeros(16)
    for t, (g, h, u) in enumerate(zip(grads, hs, out, strict=True), start=1):
        exact = A * exact + C * np.outer(flat(h), flat(h))
        mu = 0.9 * mu + 0.1 * flat(g)
        dense = np.linalg.solve(GAMMA * np.eye(16) + exact, mu / (1 - 0.9**t))
        np.testing.assert_allclose(flat(u), dense, rtol=1e-8)
    assert [x.shape for x in jax.tree.leaves(state.mu)] == [(1, 16)]  # one vector, like the factor


def test_statistics_every_and_missing_samples():
    grads, hs = stream(5), sampled(stream(5, 1))
    out, _ = run(scale_by_ginger(statistics_every=2, **FREE), grads, hs)
    none, _ = run(
        scale_by_ginger(**FREE), grads, [h if t % 2 == 0 else None for t, h in enumerate(hs)]
    )
    close(out, none)


def test_bad_vectors_and_bad_gradients_change_nothing():
    grads, hs = stream(3), stream(3, 1)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), hs[1])
    for partition, blocks in (("leaf", 3), ("model", 1)):
        tx = scale_by_ginger(partition=partition, **FREE)
        _, good = run(tx, grads[:1], sampled(hs[:1]))
        out, after = run(tx, grads[1:2], sampled([nan]), good)
        assert after.rejected == blocks and after.skipped == 0
        assert np.isfinite(flat(out[0])).all()
        close(after.factors, good.factors)
        out, skipped = run(tx, [nan], sampled(hs[1:2]), good)
        assert skipped.skipped == 1 and not flat(out[0]).any()


def test_20_descent():
    """lr <= gamma / L, exact gradients: f falls by lr/2 <g, B g>, whatever the vectors are."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.choice([-1.0, 1.0], 40)
    smooth = np.linalg.eigvalsh(x.T @ x / 40)[-1] / 4
    for gamma in (0.1, 1e-3):
        tx = scale_by_ginger(**FREE | {"damping": gamma, "beta1": "none", "rank": 3})
        update, theta = jax.jit(tx.update), np.zeros(6)
        state, lr = tx.init({"t": jnp.zeros(6)}), gamma / smooth
        for _ in range(60):
            margin = 1 / (1 + np.exp(y * (x @ theta)))
            loss, g = np.mean(np.log1p(np.exp(-y * (x @ theta)))), -x.T @ (y * margin) / 40
            h = np.sqrt(40) * x.T @ (rng.normal(size=40) * 0.5) / 40
            u, state = update({"t": jnp.asarray(g)}, state,
                              curvature=Samples.from_gradients({"t": jnp.asarray(h)}))  # fmt: skip
            u = np.asarray(u["t"])
            theta = theta - lr * u
            after = np.mean(np.log1p(np.exp(-y * (x @ theta))))
            assert after <= loss - lr / 2 * g @ u + 1e-12


def test_a_rounded_basis_stays_usable():
    """bfloat16 storage: some percent of the direction, orthonormal to rounding."""
    grads, hs = stream(30), sampled(stream(30, 1))
    options = FREE | {"rank": 3, "damping": 0.1}
    exact, _ = run(scale_by_ginger(**options), grads, hs)
    out, state = run(scale_by_ginger(basis_dtype=jnp.bfloat16, **options), grads, hs)
    basis = state.factors["4x3"].basis[0]
    assert basis.dtype == jnp.bfloat16
    u = np.asarray(basis, np.float64).reshape(3, -1)
    assert np.abs(u @ u.T - np.eye(3)).max() < 2e-2
    assert relative(flat(out[-1]), flat(exact[-1])) < 0.15


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"fisher": "exact"}, "fisher must be"),
        ({"partition": "layer"}, "partition must be"),
        ({"preset": "best"}, "preset must be"),
    ],
)
def test_choices_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        scale_by_ginger(**options)


def test_errors_of_an_update_say_what_to_do():
    grads = stream(1)[0]
    for partition in ("leaf", "model"):
        tx = scale_by_ginger(partition=partition)
        state = tx.init(grads)
        with pytest.raises(ValueError, match="`curvature=` is missing"):
            tx.update(grads, state)
        with pytest.raises(TypeError, match="takes sampled gradients"):
            tx.update(grads, state, curvature=grads)
        with pytest.raises(KeyError, match="no gradients of parameter 'b'"):
            tx.update(grads, state, curvature=Samples.from_gradients({"s": grads["s"]}))
        wrong = Samples.from_gradients(grads | {"w": grads["w"].T})
        with pytest.raises(ValueError, match="samples of parameter 'w' have shape"):
            tx.update(grads, state, curvature=wrong)


def test_the_whole_model_with_empty_and_mixed_leaves():
    """Empty leaves take no part and leave nothing behind in the state; dtypes are kept."""
    grads = {"w": jnp.ones((4, 3), jnp.float32), "e": jnp.zeros((0, 3)), "s": jnp.ones(())}
    tx = scale_by_ginger(partition="model", fisher="empirical", **FREE)
    state = tx.init(grads)
    updates, new = jax.jit(tx.update)(grads, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), grads
    )
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert all(x.size for x in jax.tree.leaves(new))
    for other in ({"w": grads["w"].T, "s": grads["s"]}, {"w": grads["w"]}):
        with pytest.raises(ValueError, match="'w'"):
            tx.update(other, state)
    with pytest.raises(ValueError, match="'w' is complex64"):
        tx.update({"w": grads["w"].astype(jnp.complex64)}, state)
