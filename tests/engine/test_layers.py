"""Layers as blocks: packing, statistics by `curvature=`, fallback, masks, groups, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from kradagrad_jax.engine import scale_by_layers

SUMS = kj.BlockMethod(  # remembers the last statistic's Gram matrices; multiplies by them
    init=lambda shape, dtype: tuple(jnp.eye(n, dtype=dtype) for n in shape),
    accumulate=lambda factor, s, step: (s.a.T @ s.a, s.g.T @ s.g),
    refresh=lambda factor, step: factor,
    precondition=lambda factor, g, step: factor[0] @ g @ factor[1],
)
ZERO = SUMS._replace(precondition=lambda factor, g, step: 0 * g)
TWO = {"refresh_every": 1}


def params():
    key = jax.random.key(0)
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    return {
        "dense": {"w": draw(0, 3, 2), "b": draw(1, 2)},
        "other": {"w": draw(2, 3, 2), "b": draw(3, 2)},
        "conv": {"w": draw(4, 2, 2, 3, 4)},
        "stack": {"w": draw(5, 2, 3, 2), "b": draw(6, 2, 2)},
        "scale": draw(7, 5),
    }


SPEC = CaptureSpec.from_layers(
    [
        Layer.dense("dense/w", (3, 2), bias="dense/b"),
        Layer.dense("other/w", (3, 2), bias="other/b"),
        Layer.conv("conv/w", (2, 2, 3, 4)),
        Layer.dense("stack/w", (2, 3, 2), bias="stack/b"),
    ]
)


def given(seed=0, spec=SPEC):
    rng = np.random.default_rng(seed)
    rows = {}
    for i, layer in enumerate(spec.layers):
        n = 5 + i  # layers of one shape with different numbers of rows
        d = layer.d_in + (layer.bias is not None)
        rows[layer.path] = (
            jnp.asarray(rng.normal(size=(layer.stack, n, d)), jnp.float32),
            jnp.asarray(rng.normal(size=(layer.stack, n, layer.d_out)), jnp.float32),
        )
    return Curvature.from_rows(rows, spec)


def one_step(tx, p=None, curvature=None):
    p = params() if p is None else p
    state = tx.init(p)
    return jax.jit(tx.update)(p, state, p, curvature=given() if curvature is None else curvature)


def test_every_layer_gets_its_own_statistic():
    p, curvature = params(), given()
    updates, state = one_step(scale_by_layers(SUMS, SPEC, fallback="identity", **TWO))
    for name in ("dense", "other"):
        rows = curvature.rows(f"{name}/w")
        m = jnp.concatenate([p[name]["w"], p[name]["b"][None]])
        expected = rows.a[0].T @ rows.a[0] @ m @ (rows.g[0].T @ rows.g[0])
        np.testing.assert_allclose(updates[name]["w"], expected[:-1], rtol=1e-5)
        np.testing.assert_allclose(updates[name]["b"], expected[-1], rtol=1e-5)
    rows = curvature.rows("stack/w")
    m = jnp.concatenate([p["stack"]["w"], p["stack"]["b"][:, None]], 1)
    for k in range(2):
        expected = rows.a[k].T @ rows.a[k] @ m[k] @ (rows.g[k].T @ rows.g[k])
        np.testing.assert_allclose(updates["stack"]["w"][k], expected[:-1], rtol=1e-5)
        np.testing.assert_allclose(updates["stack"]["b"][k], expected[-1], rtol=1e-5)
    rows = curvature.rows("conv/w")
    expected = rows.a[0].T @ rows.a[0] @ p["conv"]["w"].reshape(12, 4) @ (rows.g[0].T @ rows.g[0])
    np.testing.assert_allclose(updates["conv"]["w"], expected.reshape(2, 2, 3, 4), rtol=1e-5)
    np.testing.assert_array_equal(updates["scale"], p["scale"])
    assert list(state.factors) == ["12x4", "4x2"]
    assert state.factors["4x2"][0].shape == (4, 4, 4)


def test_channels_first_only_permutes():
    """The order of rows is the method's business: a symmetric method gives the same update."""
    plain, _ = one_step(scale_by_layers(SUMS, SPEC, **TWO))
    moved, state = one_step(scale_by_layers(SUMS, SPEC, channels_first=True, **TWO))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, moved)
    a = given().rows("conv/w").a[0]
    order = np.arange(12).reshape(2, 2, 3).transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(state.factors["12x4"][0][0], a[:, order].T @ a[:, order], rtol=1e-5)


def test_channels_first_with_one_input_and_a_bias():
    """The bias is a row of its own also where it outnumbers the inputs."""
    spec = CaptureSpec.from_layers([Layer.conv("w", (1, 1, 1, 2), bias="b")])
    p = {"w": jnp.arange(2.0).reshape(1, 1, 1, 2), "b": jnp.arange(2.0, 4.0)}
    found = given(spec=spec)
    plain, _ = one_step(scale_by_layers(SUMS, spec, **TWO), p, found)
    moved, _ = one_step(scale_by_layers(SUMS, spec, channels_first=True, **TWO), p, found)
    jax.tree.map(np.testing.assert_array_equal, plain, moved)


def test_no_new_statistics_keep_the_factors():
    tx = scale_by_layers(SUMS, SPEC, fallback="identity", **TWO)
    p = params()
    state = tx.init(p)
    _, state = tx.update(p, state, p, curvature=given())
    for curvature in (None, Curvature(given(1).stats, jnp.ones(()), jnp.zeros((), bool), SPEC)):
        _, after = tx.update(p, state, p, curvature=curvature)
        jax.tree.map(np.testing.assert_array_equal, after.factors, state.factors)
        assert int(kj.diagnostics(after)["statistics"]) == 1
        assert int(after.count) == 2


def test_a_layer_without_statistics_is_not_preconditioned():
    p = params()
    for options in ({}, {"inverse": "eigh"}, {"damping_rule": "exact"}):
        tx = kj.scale_by_kfac(SPEC, graft="none", fallback="identity", **options)
        updates, _ = tx.update(p, tx.init(p), p, curvature=None)
        jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g, rtol=1e-6), updates, p)


def test_without_joint_bias_the_bias_is_left_to_the_fallback():
    tx = scale_by_layers(SUMS, SPEC, joint_bias=False, fallback="identity", **TWO)
    updates, state = one_step(tx)
    np.testing.assert_array_equal(updates["dense"]["b"], params()["dense"]["b"])
    assert list(state.factors) == ["12x4", "3x2"]
    assert tx.covered(params())["dense"] == {"w": True, "b": False}


def test_methods_by_layer():
    names = {"dense/w": "sums", "other/w": "zero", "conv/w": "zero", "stack/w": None}
    tx = scale_by_layers(
        {"sums": SUMS, "zero": ZERO}, SPEC, assign=lambda x: names[x.path], fallback="identity",
        **TWO,
    )  # fmt: skip
    updates, state = one_step(tx)
    reference, _ = one_step(scale_by_layers(SUMS, SPEC, fallback="identity", **TWO))
    np.testing.assert_allclose(updates["dense"]["w"], reference["dense"]["w"], rtol=1e-6)
    assert not updates["other"]["w"].any()
    np.testing.assert_array_equal(updates["stack"]["w"], params()["stack"]["w"])
    assert sorted(state.factors) == ["sums 4x2", "zero 12x4", "zero 4x2"]
    with pytest.raises(ValueError, match="assign names methods"):
        scale_by_layers({"sums": SUMS}, SPEC, assign=lambda x: "other")


def test_the_default_fallback_is_adam():
    p = params()
    updates, _ = one_step(scale_by_layers(SUMS, SPEC, **TWO))
    adam = optax.scale_by_adam()
    expected, _ = adam.update({"scale": p["scale"]}, adam.init({"scale": p["scale"]}))
    np.testing.assert_allclose(updates["scale"], expected["scale"], rtol=1e-6)


def test_a_fallback_sees_parameters_in_their_own_tree():
    p = params()
    mask = {"dense": False, "other": False, "conv": False, "stack": False, "scale": True}
    fallback = optax.add_decayed_weights(0.5, mask)
    updates, _ = one_step(scale_by_layers(SUMS, SPEC, fallback=fallback, **TWO))
    np.testing.assert_allclose(updates["scale"], 1.5 * p["scale"], rtol=1e-6)


def test_momentum_of_the_alias_leaves_the_fallback_alone():
    p = params()
    tx = kj.kfac(1.0, SPEC, momentum=0.9, fallback="identity")
    state = tx.init(p)
    for _ in range(3):
        updates, state = tx.update(p, state, p, curvature=given())
    np.testing.assert_allclose(updates["scale"], -p["scale"], rtol=1e-6)


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_under_masks(wrap):
    p = params()
    mask = {k: k != "other" for k in p}
    inner = scale_by_layers(SUMS, SPEC, **TWO)
    if wrap == "masked":
        tx = optax.masked(inner, mask)
    else:
        labels = {k: "a" if v else "b" for k, v in mask.items()}
        tx = optax.partition({"a": inner, "b": optax.identity()}, labels)
    reference, _ = one_step(inner)
    updates, _ = one_step(tx)
    np.testing.assert_array_equal(updates["other"]["w"], p["other"]["w"])
    np.testing.assert_allclose(updates["dense"]["w"], reference["dense"]["w"], rtol=1e-6)


def test_bfloat16_parameters():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    updates, state = one_step(kj.scale_by_kfac(SPEC), p)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
    floats = [x for x in jax.tree.leaves(state.factors) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float32 for x in floats)


def test_nonfinite_gradients_and_statistics_change_nothing():
    tx = kj.scale_by_kfac(SPEC, refresh_every=1)
    p = params()
    _, good = one_step(tx)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), p)
    updates, state = tx.update(bad, good, p, curvature=given(1))
    assert not any(x.any() for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, state.factors, good.factors)
    assert int(state.skipped) == 1
    worse = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, given(1))
    updates, state = tx.update(p, good, p, curvature=worse)
    jax.tree.map(np.testing.assert_array_equal, state.factors, good.factors)
    assert int(state.rejected) > 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_norm_constraint_and_rms_clip():
    p, lr, kappa = params(), 0.1, 1e-3
    options = {"refresh_every": 1, "fallback": "identity"}
    free, _ = one_step(kj.scale_by_kfac(SPEC, **options))
    held, _ = one_step(kj.scale_by_kfac(SPEC, norm_constraint=kappa, learning_rate=lr, **options))

    names = [k for k in p if k != "scale"]
    pairs = jax.tree.map(lambda u, g: jnp.sum(u * g), free, p)
    q = sum(jax.tree.leaves({k: pairs[k] for k in names}))
    assert lr**2 * q > kappa
    scale = jnp.sqrt(kappa / (lr**2 * q))
    for k in names:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-4), held[k], free[k]
        )
    clipped, _ = one_step(kj.scale_by_kfac(SPEC, rms_clip=0.01, **options))
    both = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(clipped["dense"])])
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(both**2)), 0.01, rtol=1e-5)
    with pytest.raises(ValueError, match="needs learning_rate"):
        kj.scale_by_kfac(SPEC, norm_constraint=kappa)


def test_messages():
    tx, p = kj.scale_by_kfac(SPEC), params()
    state = tx.init(p)
    with pytest.raises(ValueError, match="`curvature=` is missing"):
        tx.update(p, state, p)
    with pytest.raises(ValueError, match=r"leaf 'dense/w' of shape \(3, 2\).*received \(4, 2\)"):
        tx.init(p | {"dense": {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="no such leaf"):
        tx.init({"scale": jnp.ones(3)})
    with pytest.raises(ValueError, match="no parameter leaf"):
        kj.scale_by_kfac(CaptureSpec.from_layers([]))
    fewer = CaptureSpec.from_layers(SPEC.layers[1:])
    with pytest.raises(KeyError, match="dense/w"):
        tx.update(p, state, p, curvature=given(spec=fewer))


def test_wrappers_deliver_the_curvature():
    p = params()
    reference, _ = one_step(kj.kfac(0.1, SPEC))
    for tx in (
        optax.chain(optax.clip_by_global_norm(1e9), kj.kfac(0.1, SPEC)),
        optax.inject_hyperparams(kj.kfac, static_args=("spec",))(0.1, SPEC),
        optax.apply_if_finite(kj.kfac(0.1, SPEC), 3),
    ):
        updates, _ = one_step(tx)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, reference)
    steps = optax.MultiSteps(kj.kfac(0.1, SPEC), 2)
    state = steps.init(p)
    for _ in range(2):
        updates, state = steps.update(p, state, p, curvature=given())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, reference)


def test_state_survives_abstract_init_and_placeholders():
    tx, p = kj.kfac(0.1, SPEC), params()
    abstract = jax.eval_shape(tx.init, p)
    concrete = tx.init(p)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    optax.tree.map_params(tx, lambda x: x, concrete)
