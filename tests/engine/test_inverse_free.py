"""The public transformations of IKFAC, INGD, SINGD and SIRFShampoo on small trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.transforms.singd import scale_by_ikfac, scale_by_ingd, scale_by_singd
from kradagrad_jax.transforms.sirfshampoo import scale_by_sirfshampoo
from tests.linalg.matrices import FACTORISATIONS, primitives

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": jnp.ones((2, 2, 3, 4)), "bias": jnp.zeros(4)},
    "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)},
    "scale": jnp.ones(3),
}
SPEC = CaptureSpec.from_layers(
    [
        Layer.conv("conv/kernel", (2, 2, 3, 4), bias="conv/bias"),
        Layer.dense("dense/kernel", (5, 3), bias="dense/bias"),
    ]
)
STRUCTURES = ["dense", "diagonal", "block_diagonal:2", "tril", "triu_toeplitz", "hierarchical:1,2",
              "triu_top_left_diag:1"]  # fmt: skip


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def statistics(seed=0):
    rng = np.random.default_rng(seed)

    def rows(d_in, d_out):
        return tuple(jnp.asarray(0.3 * rng.normal(size=(6, d)), jnp.float32) for d in (d_in, d_out))

    return Curvature.from_rows({"conv/kernel": rows(12, 4), "dense/kernel": rows(5, 3)}, SPEC)


GRADS, CURVATURE = random_like(PARAMS), statistics()


def factors(state):
    return jax.tree.leaves(state.factors)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("make", [scale_by_singd, scale_by_ikfac])
def test_no_factorization(make, name):
    tx = make(SPEC, structures=name)
    state = tx.init(PARAMS)
    jaxpr = jax.make_jaxpr(tx.update)(GRADS, state, PARAMS, curvature=CURVATURE)
    assert not primitives(jaxpr) & FACTORISATIONS


def test_no_factorization_in_sirfshampoo():
    tx = scale_by_sirfshampoo(batch_size=4, structures="hierarchical:1,1")
    jaxpr = jax.make_jaxpr(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert not primitives(jaxpr) & FACTORISATIONS


@pytest.mark.parametrize("kind", ["singd", "sirfshampoo"])
def test_factors_move_every_third_step_only(kind):
    if kind == "singd":
        tx, extra = scale_by_singd(SPEC, refresh_every=3), {"curvature": CURVATURE}
    else:
        tx, extra = scale_by_sirfshampoo(batch_size=4, refresh_every=3), {}
    state, update, moved = tx.init(PARAMS), jax.jit(tx.update), []
    for _ in range(7):
        _, new = update(GRADS, state, PARAMS, **extra)
        pairs = zip(factors(new), factors(state), strict=True)
        moved.append(any(bool(jnp.any(a != b)) for a, b in pairs))
        state = new
    assert moved == [True, False, False, True, False, False, True]


def test_without_factor_steps_it_is_plain_gradient_descent():
    tx = scale_by_singd(SPEC, preset="official", lr_cov=0.0, fallback="identity")
    u, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=CURVATURE)
    jax.tree.map(np.testing.assert_array_equal, u, GRADS)


def test_a_step_without_statistics_keeps_the_factors():
    tx = scale_by_ingd(SPEC, refresh_every=1)
    state = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=CURVATURE)[1]
    later = tx.update(GRADS, state, PARAMS, curvature=None)[1]
    jax.tree.map(np.testing.assert_array_equal, later.factors, state.factors)


def test_structures_per_parameter():
    tx = scale_by_singd(
        SPEC,
        structures=("hierarchical:1,1", "diagonal"),
        overrides=[("^dense", None), (lambda layer: layer.kind == "conv", ("diagonal", "dense"))],
    )
    state = tx.init(PARAMS)
    (factor,) = state.factors.values()
    assert factor.k.shape == (1, 13)
    assert factor.c.shape == (1, 4, 4)
    assert "diagonal|dense 13x4" in state.factors


def test_state_is_smaller_than_that_of_adam():
    """A (1024, 1024) layer, in units of one weight; momentum is one more."""
    weight = {"w": jnp.zeros((1024, 1024))}
    spec = CaptureSpec.from_layers([Layer.dense("w", (1024, 1024))])
    expected = {"dense": 4.0, "hierarchical:15,15": 0.12, "block_diagonal:30": 0.12,
                "diagonal": 0.004, "tril_toeplitz": 0.004}  # fmt: skip
    for name, units in expected.items():
        for make, share in ((scale_by_singd, 1.0), (scale_by_ikfac, 0.5)):
            tx = make(spec, preset="official", structures=name)
            state = jax.eval_shape(tx.init, weight)
            size = sum(x.size for x in jax.tree.leaves(state.factors)) / 1024**2
            assert abs(size - share * units) < 0.005


def test_dtypes_of_the_factors():
    dtypes = (jnp.bfloat16, jnp.float32)
    tx = scale_by_singd(SPEC, factor_dtype=dtypes, riemannian_momentum=0.5)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    state = tx.init(params)
    for _ in range(2):
        u, state = jax.jit(tx.update)(grads, state, params, curvature=CURVATURE)
    for factor in state.factors.values():
        assert {factor.k.dtype, factor.m_k.dtype} == {jnp.dtype(jnp.bfloat16)}
        assert {factor.c.dtype, factor.m_c.dtype} == {jnp.dtype(jnp.float32)}
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(u))


def test_loss_scaling_changes_nothing():
    """Output gradients of a loss times 1024, brought back in the statistics."""
    known = {path: CURVATURE.rows(path) for path in CURVATURE.stats}
    rows = {path: (x.a, 1024 * x.g) for path, x in known.items()}
    scaled = Curvature.from_rows(rows, SPEC).scale_cotangents(1 / 1024)
    tx = scale_by_ikfac(SPEC, preset="official")
    u, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=CURVATURE)
    v, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, curvature=scaled)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), u, v)


@pytest.mark.parametrize("make", [scale_by_singd, scale_by_ikfac])
def test_micro_batches_are_the_full_batch(make):
    """The sum of the statistics of two mean losses over halves is that of the whole mean loss."""
    rng = np.random.default_rng(3)
    spec = CaptureSpec.from_layers([Layer.dense("w", (5, 3))])
    a, g = (jnp.asarray(rng.normal(size=(8, d)), jnp.float32) for d in (5, 3))

    def mean_over(part):
        n = len(a[part]) ** 0.5
        return Curvature.from_rows({"w": (a[part] / n, g[part] / n)}, spec)

    tx, w = make(spec, preset="official"), {"w": jnp.ones((5, 3))}
    both = mean_over(slice(4)) + mean_over(slice(4, 8))
    u = tx.update(w, tx.init(w), w, curvature=mean_over(slice(8)))[0]
    v = tx.update(w, tx.init(w), w, curvature=both)[0]
    np.testing.assert_allclose(u["w"], v["w"], rtol=1e-5)


def test_a_gradient_that_is_not_finite_skips_the_step():
    tx = scale_by_singd(SPEC, refresh_every=1)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda x: x * jnp.nan, GRADS)
    u, new = tx.update(bad, state, PARAMS, curvature=CURVATURE)
    jax.tree.map(np.testing.assert_array_equal, new.factors, state.factors)
    assert not any(bool(jnp.any(x)) for x in jax.tree.leaves(u))
    assert int(new.count) == 1


def test_the_batch_size_of_sirfshampoo():
    """(G, B) and (2 G, B / 4) have the same factors; a traced argument is as good as a number."""
    twice = jax.tree.map(lambda x: 2 * x, GRADS)
    states = []
    for grads, options, extra in (
        (GRADS, {"batch_size": 16}, {}),
        (twice, {}, {"batch_size": jnp.asarray(4)}),
    ):
        tx = scale_by_sirfshampoo(preset="official", **options)
        states.append(jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, **extra)[1])
    jax.tree.map(np.testing.assert_array_equal, states[0].factors, states[1].factors)
    tx = scale_by_sirfshampoo()
    with pytest.raises(ValueError, match="batch_size"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_structures_of_sirfshampoo():
    tx = scale_by_sirfshampoo(
        batch_size=4,
        structures={1: "diagonal", 2: ("dense", "tril"), 4: "dense"},
        overrides=[("dense/kernel", "flatten:diagonal")],
        max_dim=3,
    )
    params = PARAMS | {"embed": jnp.ones((2, 3)), "temperature": jnp.ones(())}
    state = tx.init(params)
    found = {key: [jax.tree.map(jnp.shape, r) for r in f.roots] for key, f in state.factors.items()}
    assert found["1 5x3"] == [(1, 15)]
    assert found["0 2x3"] == [(1, 2, 2), (1, 3, 2)]
    assert found["0 2x2x3x4"] == [(1, 2, 2), (1, 2, 2), (1, 3, 3), (1, 4)]
    assert found["0 1"] == [(1, 1)]
    tx = scale_by_sirfshampoo(batch_size=4, structures=("dense", "dense"))
    with pytest.raises(ValueError, match="axes"):
        tx.init(params)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"structures": "tridiagonal"}, "unknown structure"),
        ({"structures": ("dense",) * 3}, "pair"),
        ({"normalize_lr_cov": "l2"}, "normalize_lr_cov"),
        ({"preset": "fast"}, "preset"),
    ],
)
def test_errors_before_tracing(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_singd(SPEC, **options)


def test_training_reduces_the_loss():
    """A linear model with SINGD in bfloat16 factors, in a chain."""
    x = jnp.asarray(RNG.normal(size=(32, 5)), jnp.float32)
    y = x @ jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    spec = CaptureSpec.from_layers([Layer.dense("w", (5, 3))])
    tx = optax.chain(
        scale_by_singd(spec, structures="hierarchical:2,2", factor_dtype=jnp.bfloat16),
        optax.scale_by_learning_rate(0.05),
    )
    params = {"w": jnp.zeros((5, 3))}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        g = (x @ params["w"] - y) / 32
        rows = {"w": (x / 32**0.5, g * 32**0.5)}
        curvature = Curvature.from_rows(rows, spec)
        u, state = tx.update({"w": x.T @ g}, state, params, curvature=curvature)
        return optax.apply_updates(params, u), state, jnp.mean((32 * g) ** 2)

    losses = []
    for _ in range(150):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 1e-2 * losses[0]
