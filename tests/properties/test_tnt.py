"""TNT (tnt.md section 6, numbers in the names): one block, then the transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.factors.tnt import TntOptions, tnt_method
from kradagrad_jax.transforms.tnt import scale_by_tnt
from kradagrad_jax.transforms.tnt_tools import tnt_rates, tnt_warm_start
from tests.properties.draws import orthogonal

each_shape = pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 2, 2)], ids=str)
two_shapes = pytest.mark.parametrize("shape", [(5,), (3, 2, 4)], ids=str)
PLAIN = TntOptions(grouping="none", damping=0.1)


def step(count=1):
    count = jnp.asarray(count, jnp.int32)
    return Step(count, 1, count, count - 1)


@functools.cache
def jitted(options):
    m = tnt_method(options)
    return m, *(jax.jit(f) for f in (m.accumulate, m.refresh, m.precondition))


def draws(shape, n, seed=0):
    return (
        np.random.default_rng(seed).normal(size=(n, *shape))
        * np.linspace(0.5, 2, shape[0])[(slice(None),) + (None,) * (len(shape) - 1)]
    )


def factor_of(samples, options=PLAIN):
    """The refreshed factor after one sample per step."""
    m, accumulate, refresh, _ = jitted(options)
    factor = m.init(samples.shape[1:], jnp.float64)
    for t, s in enumerate(samples, start=1):
        factor = accumulate(factor, jnp.asarray(s)[None], step(t))
    return refresh(factor, step(len(samples)))


def direct(factor, g, options=PLAIN):
    after = step()._replace(refreshes=jnp.asarray(1, jnp.int32))
    return np.asarray(jitted(options)[3](factor, jnp.asarray(g), after))


def with_omegas(omegas, options=PLAIN):
    """The refreshed factor of given averages."""
    m, _, refresh, _ = jitted(options)
    factor = m.init(tuple(len(o) for o in omegas), jnp.float64)
    statistics = tuple(jnp.asarray(o) for o in omegas)
    return refresh(factor._replace(statistics=statistics), step())


def us(factor):
    """(U_1, .., U_k), c, T of a factor."""
    omegas = [np.asarray(o) for o in factor.statistics]
    d = np.array([len(o) for o in omegas])
    trace = np.trace(omegas[0])
    c = (trace / d.prod()) ** (1 / len(d))
    return [o * c * n / trace for o, n in zip(omegas, d, strict=True)], c, trace


def kron(matrices):
    return functools.reduce(np.kron, matrices)


def modes(x, matrices):
    for i, m in enumerate(matrices):
        x = np.moveaxis(np.tensordot(m, x, ((1,), (i,))), 0, i)
    return x


def spd(n, seed):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T / n + 0.1 * np.eye(n)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@each_shape
def test_01_02_04_05_traces_scales_and_solves(shape):
    """Equal traces, one mean eigenvalue c, P (U + eps) = I, D = dense solve."""
    factor, g = factor_of(draws(shape, 5)), draws(shape, 1, 9)[0]
    u, c, trace = us(factor)
    for omega in factor.statistics:
        assert abs(np.trace(omega) / trace - 1) < 1e-14
    assert abs(np.prod([np.trace(x) for x in u]) / trace - 1) < 1e-13
    for x, p in zip(u, factor.preconditioners, strict=True):
        assert abs(np.trace(x) / len(x) / c - 1) < 1e-13
        assert np.abs(np.asarray(p) @ (x + 0.1 * np.eye(len(x))) - np.eye(len(x))).max() < 1e-13
        np.testing.assert_array_equal(p, np.asarray(p).T)
    dense = np.linalg.solve(kron([x + 0.1 * np.eye(len(x)) for x in u]), g.ravel())
    assert relative(direct(factor, g).ravel(), dense) < 1e-12


@each_shape
def test_03_06_tensor_normal_statistics_give_their_covariance(shape):
    v = [spd(n, i) for i, n in enumerate(shape)]
    others = [np.prod([np.trace(x) for j, x in enumerate(v) if j != i]) for i in range(len(v))]
    options = PLAIN._replace(damping=0.0)
    omegas = [x * t for x, t in zip(v, others, strict=True)]
    factor = with_omegas(omegas, options)
    u, _, trace = us(factor)
    assert relative(kron(u), kron(v)) < 1e-13
    g = draws(shape, 1, 9)[0]
    expected = trace ** (len(shape) - 1) * modes(g, [np.linalg.inv(o) for o in omegas])
    assert relative(direct(factor, g, options), expected) < 1e-11
    assert relative(direct(factor, g, options).ravel(), np.linalg.solve(kron(v), g.ravel())) < 1e-11


@each_shape
def test_07_rotations_and_permutations(shape):
    samples, g = draws(shape, 4), draws(shape, 1, 9)[0]
    turns = [orthogonal(n, i) for i, n in enumerate(shape)]
    plain = direct(factor_of(samples), g)
    turned = direct(factor_of(np.stack([modes(s, turns) for s in samples])), modes(g, turns))
    assert relative(turned, modes(plain, turns)) < 1e-12
    order = tuple(reversed(range(len(shape))))
    swapped = factor_of(samples.transpose(0, *(a + 1 for a in order)))
    assert relative(direct(swapped, g.transpose(order)), plain.transpose(order)) < 1e-13


@each_shape
def test_08_bounds(shape):
    factor, g = factor_of(draws(shape, 5)), draws(shape, 1, 9)[0]
    d, (u, c, _) = direct(factor, g), us(factor)
    assert np.linalg.norm(d) <= 0.1 ** -len(shape) * np.linalg.norm(g)
    least = np.prod([1 / (np.linalg.eigvalsh(x)[-1] + 0.1) for x in u])
    assert np.sum(g * d) >= least * np.sum(g * g) * (1 - 1e-12)
    assert least >= np.prod([1 / (c * n + 0.1) for n in shape]) * (1 - 1e-12)


@two_shapes
@pytest.mark.parametrize("s", [128.0, 1e-6])
def test_09_scaling(shape, s):
    samples, g, k = draws(shape, 4), draws(shape, 1, 9)[0], len(shape)
    scaled = PLAIN._replace(damping=float(0.1 * s ** (1 / k)))
    other = direct(factor_of(np.sqrt(s) * samples, scaled), g, scaled)
    assert relative(other * s, direct(factor_of(samples), g)) < 1e-12
    by_option = scaled._replace(fisher_scale=s)
    np.testing.assert_allclose(direct(factor_of(samples, by_option), g, by_option), other)


def test_10_11_large_damping_and_unit_modes():
    samples, g = draws((4, 3), 4), draws((4, 3), 1, 9)[0]
    large, none = PLAIN._replace(damping=1e6), PLAIN._replace(damping=0.0)
    assert relative(1e12 * direct(factor_of(samples, large), g, large), g) < 1e-4
    plain = direct(factor_of(samples, none), g, none)
    unit = direct(factor_of(samples[..., None], none), g[..., None], none)
    assert relative(unit[..., 0], plain) < 1e-12
    damped = direct(factor_of(samples[..., None]), g[..., None])[..., 0]
    assert relative(damped, direct(factor_of(samples), g)) > 0.05


@two_shapes
def test_12_13_averages(shape):
    samples = draws(shape, 3)
    plain, signs = factor_of(samples), factor_of(-samples)
    for a, b in zip(plain.statistics, signs.statistics, strict=True):
        np.testing.assert_array_equal(a, b)
    before = factor_of(samples[:2])
    for new, old in zip(plain.statistics, before.statistics, strict=True):
        assert np.linalg.eigvalsh(new - 0.9 * old)[0] > -1e-13
    constant = factor_of(np.repeat(samples[:1], 6, 0))
    for a, b in zip(constant.statistics, factor_of(samples[:1]).statistics, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def test_14_one_gradient_is_its_own_inverse_square():
    a, b = orthogonal(4, 0), orthogonal(4, 1)
    s = np.array([2.0, 1.0, 0.7, 0.3])
    options = PLAIN._replace(damping=0.0)
    g = a @ np.diag(s) @ b.T
    expected = np.sum(s**2) * a @ np.diag(s**-3) @ b.T
    assert relative(direct(factor_of(g[None], options), g, options), expected) < 1e-11


@two_shapes
@pytest.mark.parametrize(
    "changes",
    [{"inverse": "eigh"}, {"inverse": "newton"}, {"statistics": "square_root"}],
    ids=str,
)
def test_other_inverses_agree(shape, changes):
    samples, g = draws(shape, 4), draws(shape, 1, 9)[0]
    options = PLAIN._replace(**changes)
    tolerance = 1e-5 if changes.get("inverse") == "newton" else 1e-12
    assert relative(direct(factor_of(samples, options), g, options),
                    direct(factor_of(samples), g)) < tolerance  # fmt: skip


@two_shapes
def test_20_21_factored_and_joint_damping(shape):
    samples, g, k = draws(shape, 4), draws(shape, 1, 9)[0], len(shape)
    factored = PLAIN._replace(damping=0.1**k, damping_rule="factored")
    plain = direct(factor_of(samples), g)
    assert relative(direct(factor_of(samples, factored), g, factored), plain) < 1e-12
    joint = PLAIN._replace(damping=0.01, damping_rule="joint")
    u, _, _ = us(factor_of(samples))
    dense = np.linalg.solve(kron(u) + 0.01 * np.eye(g.size), g.ravel())
    assert relative(direct(factor_of(samples, joint), g, joint).ravel(), dense) < 1e-10
    relative_too = PLAIN._replace(damping=0.02, relative_damping=0.5)
    _, c, _ = us(factor_of(samples))
    same = PLAIN._replace(damping=float(0.02 + 0.5 * c))
    ours = direct(factor_of(samples, relative_too), g, relative_too)
    assert relative(ours, direct(factor_of(samples, same), g, same)) < 1e-12


@pytest.mark.parametrize("form", ["gram", "square_root"])
@pytest.mark.parametrize("rule", ["per_mode", "joint"])
def test_long_modes_are_diagonal(form, rule):
    """Other modes do not notice: the trace is the same."""
    if (form, rule) == ("square_root", "joint"):
        return
    samples, g = draws((4, 3), 5), draws((4, 3), 1, 9)[0]
    options = PLAIN._replace(max_dim=3, statistics=form, damping_rule=rule)
    factor = factor_of(samples, options)
    left, right = us(factor_of(samples))[0]
    left = np.diag(np.diag(left))
    full = {"per_mode": kron([left + 0.1 * np.eye(4), right + 0.1 * np.eye(3)])}
    full["joint"] = kron([left, right]) + 0.1 * np.eye(12)
    expected = np.linalg.solve(full[rule], g.ravel())
    assert relative(direct(factor, g, options).ravel(), expected) < 1e-12
    assert factor.statistics[0].shape == (4,)


@pytest.mark.parametrize(
    ("grouping", "merged"),
    [
        ("filter_flattening", (6, 4, 5)),
        ("kfac_reshaping", (24, 5)),
        ("none", (2, 3, 4, 5)),
        (lambda shape: [[3], [0, 1], [2]], (5, 6, 4)),
    ],
    ids=["filter", "kfac", "none", "own"],
)
def test_groupings_of_a_kernel(grouping, merged):
    options = PLAIN._replace(grouping=grouping)
    samples, g = draws((2, 3, 4, 5), 4), draws((2, 3, 4, 5), 1, 9)[0]
    factor = factor_of(samples, options)
    assert tuple(len(p) for p in factor.preconditioners) == merged
    axes = (3, 0, 1, 2) if callable(grouping) else (0, 1, 2, 3)
    flat = factor_of(samples.transpose(0, *(a + 1 for a in axes)).reshape(-1, *merged))
    expected = direct(flat, g.transpose(axes).reshape(merged))
    ours = direct(factor, g, options).transpose(axes).reshape(merged)
    assert relative(ours, expected) < 1e-12


def test_several_samples_are_averaged():
    samples = jnp.asarray(draws((4, 3), 4))
    m, accumulate, _, _ = jitted(PLAIN)
    factor = accumulate(m.init((4, 3), jnp.float64), samples, step())
    np.testing.assert_allclose(
        factor.statistics[0], np.einsum("sij,skj->ik", samples, samples) / 4, rtol=1e-13
    )


def test_rows_of_a_layer_are_contracted_one_by_one():
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    m, accumulate, _, _ = jitted(PLAIN)
    factor = accumulate(m.init((4, 3), jnp.float64), Rows(jnp.asarray(a), jnp.asarray(g)), step())
    each = np.einsum("ni,nj->nij", a, g)
    left, right = np.einsum("nij,nkj->ik", each, each), np.einsum("nij,nik->jk", each, each)
    np.testing.assert_allclose(factor.statistics[0], left, rtol=1e-12)
    np.testing.assert_allclose(factor.statistics[1], right, rtol=1e-12)


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


def sampled(trees):
    return [Samples.from_gradients(t) for t in trees]


def close(a, b, rtol=1e-11):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13)


@pytest.fixture
def paper():
    return {"preset": "paper", "damping": 0.2}


def test_scalars_are_vectors_of_length_one(paper):
    """D = v / (Omega + eps), for a tensor of one entry in any shape."""
    grads, samples = stream(3), stream(3, 1)
    out, state = run(scale_by_tnt(beta1="none", refresh_every=1, **paper), grads, sampled(samples))
    omega = float(samples[0]["s"]) ** 2
    for g, s, u in zip(grads[1:], samples[1:], out[1:], strict=True):
        omega = 0.9 * omega + 0.1 * float(s["s"]) ** 2
        assert float(u["s"]) == pytest.approx(float(g["s"]) / (omega + 0.2), rel=1e-12)
    assert out[0]["s"].shape == ()
    assert state.skipped == 0


def test_16_momentum_commutes_with_a_frozen_preconditioner(paper):
    grads, samples = stream(5), sampled(stream(5, 1))
    options = paper | {"refresh_every": 100, "early_refresh": False}
    inside, _ = run(scale_by_tnt(**options), grads, samples)
    outside = optax.chain(scale_by_tnt(beta1="none", **options), optax.trace(0.9))
    close(inside, run(outside, grads, samples)[0])


def test_17_weight_decay_alone(paper):
    params = stream(1)[0]
    tx = optax.chain(
        scale_by_tnt(**paper), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.1)
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    samples = Samples.from_gradients(stream(1, 1)[0])
    updates, _ = tx.update(zero, tx.init(params), params, curvature=samples)
    close(optax.apply_updates(params, updates), jax.tree.map(lambda p: 0.95 * p, params), 1e-14)


def test_18_samples_off_the_grid_may_be_anything(paper):
    grads, good = stream(6), stream(6, 1)
    tx = scale_by_tnt(statistics_every=2, refresh_every=2, **paper)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good[0])
    expected, _ = run(tx, grads, sampled(good))
    close(
        run(tx, grads, sampled([s if t % 2 == 0 else nan for t, s in enumerate(good)]))[0], expected
    )
    none = [Samples.from_gradients(s) if t % 2 == 0 else None for t, s in enumerate(good)]
    close(run(tx, grads, none)[0], expected)


def test_steps_of_early_and_regular_refresh(paper):
    """T1 = 2, T2 = 4, warm start: inverses at t = 0, 2, 4, 8; statistics at t = 2, 4, 6, 8."""
    grads, samples = stream(10), sampled(stream(10, 1))
    options = paper | {"statistics_every": 2, "refresh_every": 4}
    tx = scale_by_tnt(**options)
    state = tnt_warm_start(tx.init(grads[0]), samples[0], grads[0], **options)
    update = jax.jit(tx.update)
    changed = {"statistics": [], "preconditioners": []}
    for t, (g, s) in enumerate(zip(grads, samples, strict=True)):
        before = state.factors["4x3"]
        _, state = update(g, state, curvature=s)
        for kind, steps in changed.items():
            old, new = (getattr(f, kind)[0] for f in (before, state.factors["4x3"]))
            if jnp.any(old != new):
                steps.append(t)
    assert changed == {"statistics": [2, 4, 6, 8], "preconditioners": [0, 2, 4, 8]}


def test_a_warm_start_is_the_plain_average(paper):
    grads, passes = stream(1)[0], stream(3, 1)
    chain = optax.chain(scale_by_tnt(**paper), optax.scale(-0.1))
    state = chain.init(grads)
    for s in passes:
        state = tnt_warm_start(state, Samples.from_gradients(s), grads, **paper)
    expected = sum(np.asarray(s["w"]) @ np.asarray(s["w"]).T for s in passes) / 3
    np.testing.assert_allclose(state[0].factors["4x3"].statistics[0][0], expected, rtol=1e-13)
    with pytest.raises(ValueError, match="no TNT statistics"):
        tnt_warm_start(optax.sgd(0.1).init(grads), Samples.from_gradients(grads), grads)


def test_the_empirical_fisher_needs_no_samples(paper):
    grads = stream(4)
    out, _ = run(scale_by_tnt(fisher="empirical", **paper), grads, [None] * 4)
    close(out, run(scale_by_tnt(**paper), grads, sampled(grads))[0])


def test_nothing_seen_is_nothing_inverted(paper):
    """Without statistics, or with zero ones, the step is the momentum and not eps^-k times it."""
    grads = stream(2)
    zero = jax.tree.map(jnp.zeros_like, grads)
    for samples in ([None, None], sampled(zero)):
        out, state = run(scale_by_tnt(**paper), grads, samples)
        close(out[0], grads[0])
        close(out[1], jax.tree.map(lambda a, b: 0.9 * a + b, *grads))
        assert state.rejected == 0


def test_bad_samples_and_bad_gradients_change_nothing(paper):
    grads, samples = stream(3), stream(3, 1)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), samples[1])
    tx = scale_by_tnt(**paper)
    _, good = run(tx, grads[:1], sampled(samples[:1]))
    out, after = run(tx, grads[1:2], sampled([nan]), good)
    assert after.rejected == 3 and after.skipped == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))
    close(after.factors, good.factors)
    out, skipped = run(tx, [nan], sampled(samples[1:2]), good)
    assert skipped.skipped == 1
    assert not any(x.any() for x in jax.tree.leaves(out))
    again, _ = run(tx, grads[1:2], sampled(samples[1:2]), skipped)
    close(again, run(tx, grads[1:2], sampled(samples[1:2]), good)[0])


def test_the_rate_of_a_confident_model_is_bounded(paper):
    """Vanishing samples: without bound the step is that of SGD with lr eps^-k."""
    grads = stream(1)[0]
    tiny = jax.tree.map(lambda x: 1e-9 * x, grads)
    samples, lr = sampled([tiny]), 0.01
    (free,), _ = run(scale_by_tnt(**paper), [grads], samples)
    rates = tnt_rates(grads, lr, **paper)
    for name, u in free.items():
        np.testing.assert_allclose(lr * u, rates[name] * grads[name], rtol=1e-5)
    bounded = scale_by_tnt(max_rate=0.1, learning_rate=lr, **paper)
    (short,), _ = run(bounded, [grads], samples)
    for name, u in short.items():
        length = lr * np.linalg.norm(u) / np.linalg.norm(grads[name])
        assert length == pytest.approx(min(rates[name], 0.1), rel=1e-5)
    lax = scale_by_tnt(max_rate=10.0, learning_rate=lambda t: lr / (t + 1).astype(float), **paper)
    close(run(lax, [grads], samples)[0], [free])


def test_recommended_bound_needs_the_learning_rate():
    grads = stream(1)[0]
    tiny = sampled([jax.tree.map(lambda x: 1e-9 * x, grads)])
    options = {"damping": 1e-3}
    (free,), _ = run(scale_by_tnt(**options), [grads], tiny)
    (bounded,), _ = run(scale_by_tnt(learning_rate=0.1, **options), [grads], tiny)
    assert np.linalg.norm(free["w"]) > 1e3 * np.linalg.norm(bounded["w"])
    with pytest.raises(ValueError, match="max_rate needs learning_rate"):
        scale_by_tnt(max_rate=1.0)


def test_layers_give_per_example_statistics():
    """A dense layer with its bias, from layer inputs and output gradients; the rest by Adam."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in
              {"w": (4, 3), "b": (3,), "scale": (4,)}.items()}  # fmt: skip
    spec = CaptureSpec.from_layers([Layer.dense("w", (4, 3), bias="b")])
    a, g = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    tx = scale_by_tnt(spec=spec, preset="paper", beta1=0.9)
    curvature = Curvature.from_rows({"w": (jnp.asarray(a), jnp.asarray(g))}, spec)
    update = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        u, state = update(params, tx.init(params), params, curvature=curvature)
        later, _ = update(params, state, params, curvature=None)
    each = np.einsum("ni,nj->nij", a, g)
    omegas = [np.einsum("nij,nkj->ik", each, each), np.einsum("nij,nik->jk", each, each)]
    matrix = np.concatenate([params["w"], params["b"][None]])
    expected = direct(with_omegas(omegas), matrix)
    np.testing.assert_allclose(u["w"], expected[:-1], rtol=1e-10)
    np.testing.assert_allclose(u["b"], expected[-1], rtol=1e-10)
    np.testing.assert_allclose(np.abs(u["scale"]), 1, rtol=1e-6)
    np.testing.assert_allclose(later["w"], 1.9 * expected[:-1], rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fisher": "exact"}, "fisher must be"),
        ({"damping_rule": "none"}, "damping_rule must be"),
        ({"averaging": "mean"}, "averaging must be"),
        ({"inverse": "lu"}, "inverse must be"),
        ({"grouping": "conv"}, "grouping must be"),
        ({"statistics": "square_root", "damping_rule": "joint"}, "does not go with"),
        ({"preset": "best"}, "preset must be"),
    ],
)
def test_choices_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        scale_by_tnt(**options)


def test_errors_of_an_update_say_what_to_do(paper):
    grads = stream(1)[0]
    tx = scale_by_tnt(**paper)
    state = tx.init(grads)
    with pytest.raises(ValueError, match="`curvature=` is missing"):
        tx.update(grads, state)
    with pytest.raises(TypeError, match="takes sampled gradients"):
        tx.update(grads, state, curvature=grads)
    with pytest.raises(KeyError, match="no gradients of parameter 'b'"):
        tx.update(grads, state, curvature=Samples.from_gradients({"w": grads["w"]}))
    wrong = Samples.from_gradients(grads | {"w": grads["w"].T})
    with pytest.raises(ValueError, match="samples of parameter 'w' have shape"):
        tx.update(grads, state, curvature=wrong)
    odd = scale_by_tnt(grouping=lambda shape: [[0]], **paper)
    with pytest.raises(ValueError, match="no partition of its axes"):
        odd.init(grads)
