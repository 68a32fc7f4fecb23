"""What the capture refuses, and what it says: one test per row of the table of hard cases."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kradagrad_jax import curvature
from tests.curvature.zoo import draw, quick, square
from tests.x64 import x64

D = draw(100)
W, V, X, B = D(4, 4), D(4, 3), D(6, 4), D(4)


def spec_of(loss, params, *args, **kw):
    return curvature.inspect(loss, params, *args, **kw)


def only(loss, params, *args):
    return spec_of(loss, params, *args).leaves[0]


def with_head(fn):
    """A loss in which ``w`` goes through ``fn(w, x)`` and a plain head follows."""
    return lambda p, x: square(jnp.tanh(fn(p, x)) @ p["z"])


def test_penalty_is_found_and_measured():
    def loss(p, x):
        return square(x @ p["w"]) + 0.5 * jnp.sum(p["w"] ** 2)

    with x64():
        params = {"w": jnp.asarray(W)}
        leaf = only(loss, params, X)
        assert leaf.status == "inexact"
        where = "test_hard_cases.py:"
        assert "also used by `" in leaf.reasons[0] and where in leaf.reasons[0]
        residual = curvature.check(loss, params, X, verbose=False)["w"]
        largest = jnp.abs(jax.grad(loss)(params, X)["w"]).max()
        np.testing.assert_allclose(residual, jnp.abs(W).max() / largest, rtol=1e-6)


def test_inexact_leaf_is_used_with_one_warning():
    step = curvature.value_grad_and_curvature(
        lambda p, x: square(x @ p["w"]) + jnp.sum(p["w"] ** 2)
    )
    with pytest.warns(UserWarning, match=r"leaf 'w' inexact: also used by `.*` at .*regularizer"):
        _, _, curv = step({"w": W}, X)
    assert "w" in curv
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step({"w": W}, X)


def power_iteration(w):
    u = lax.fori_loop(0, 3, lambda _, u: w.T @ (w @ u), jnp.ones(w.shape[1]))
    return w / jnp.linalg.norm(u)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
        lambda p, x: x @ power_iteration(p["w"]),
        lambda p, x: x @ (p["w"] * (W > 0)),
        lambda p, x: jax.nn.relu(x) @ jnp.exp(p["w"]),
    ],
    ids=["weight_norm", "spectral_norm", "mask", "exp"],
)
def test_transformed_weights_are_no_false_match(fn):
    leaf = next(x for x in spec_of(with_head(fn), {"w": W, "z": V}, X).leaves if x.path == "w")
    assert leaf.status == "none" and leaf.reasons


def test_product_of_two_parameters_and_lora():
    params = {"a": D(4, 2), "b": D(2, 4), "z": V}
    fused = spec_of(with_head(lambda p, x: x @ (p["a"] @ p["b"])), params, X)
    assert [leaf.status for leaf in fused.leaves] == ["none", "none", "full"]
    assert "combined with another parameter" in fused.leaf("a").reasons[0]
    plain = spec_of(with_head(lambda p, x: (x @ p["a"]) @ p["b"]), params, X)
    assert all(leaf.status == "full" for leaf in plain.leaves)


def test_custom_vjp_keeps_its_rule_and_is_opaque():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, x), lambda x, g: (7 * x.T @ g, 0 * x))
    loss = with_head(lambda p, x: product(p["w"], x))
    params = {"w": W, "z": V}
    assert spec_of(loss, params, X).leaf("w").status == "none"
    _, grads, _ = curvature.value_grad_and_curvature(loss)(params, X)
    np.testing.assert_allclose(grads["w"], jax.grad(loss)(params, X)["w"], rtol=1e-6)


def test_slices_are_partial():
    spec = spec_of(
        with_head(lambda p, x: jnp.pad(x @ p["w"][:, :3], ((0, 0), (0, 1)))), {"w": W, "z": V}, X
    )
    assert spec.leaf("w").status == "partial"
    table = spec_of(lambda p, x: square((x + p["p"][:4]) @ p["z"]), {"p": D(9), "z": V}, X)
    assert table.leaf("p").status == "partial"
    assert "slices" in table.leaf("p").reasons[0]


def test_loop_over_examples():
    def loss(p, x):
        return square(lax.map(lambda u: jnp.tanh(u @ p["w"] + p["b"]) @ p["z"], x))

    with x64():
        w, b, z, x = (a.astype(jnp.float64) for a in (W, B, V, X))
        residuals = curvature.check(loss, {"w": w, "b": b, "z": z}, x, verbose=False)
        assert set(residuals) == {"w", "z"} and max(residuals.values()) < 1e-15


def test_loop_over_micro_batches():
    def loss(p, x):
        def body(total, part):
            return total + square(jnp.tanh(part @ p["w"]) @ p["z"]), None

        return lax.scan(body, 0.0, x.reshape(2, -1, 4))[0] / 2

    with x64():
        w, z, x = (a.astype(jnp.float64) for a in (W, V, X))
        residuals = curvature.check(loss, {"w": w, "z": z}, x, verbose=False)
        assert set(residuals) == {"w", "z"} and max(residuals.values()) < 1e-15


def test_derivative_inside_the_loss():
    """Forward and backward products see a weight as different matrices: left to the fallback."""

    def loss(p, x):
        net = lambda u: jnp.sum(jnp.tanh(u @ p["w"]) @ p["z"])  # noqa: E731
        return square(jax.vmap(jax.grad(net))(x)) + square(x @ p["z"])

    spec = spec_of(loss, {"w": W, "z": V}, X)
    assert spec.leaf("w").status == "partial" and spec.leaf("w").uses == 2
    assert "different matrices" in spec.leaf("w").reasons[0]
    assert spec.leaf("z").status == "inexact"


def test_while_loop_is_evaluated_as_it_is():
    def loss(p, x):
        n = lax.while_loop(lambda n: n < 5, lambda n: n + 1, 0)
        return square(x @ p["w"]) * n

    _, grads, _ = curvature.value_grad_and_curvature(loss)({"w": W}, X)
    np.testing.assert_allclose(grads["w"], jax.grad(loss)({"w": W}, X)["w"], rtol=1e-6)


def test_stopped_and_auxiliary_uses_do_not_count():
    def loss(p, x):
        h = x @ p["w"] + x @ lax.stop_gradient(p["w"] ** 1)
        norm = jnp.sum(lax.stop_gradient(p["w"]) ** 2)
        return square(h), (jnp.sum(p["w"] ** 2), norm)

    assert only(loss, {"w": W}, X).status in ("full", "inexact")

    def aux_only(p, x):
        return square(x @ p["w"]), jnp.sum(p["w"] ** 2)

    assert only(aux_only, {"w": W}, X).status == "full"


def test_tied_embedding_gets_one_product():
    """Vocabulary side 1, feature side with the traces of the two uses."""
    ids = jnp.asarray([[0, 1, 2], [3, 3, 1]])

    def loss(p, ids):
        return square(jnp.tanh(p["e"][ids]) @ p["e"].T)

    def untied(p, ids):
        return square(jnp.tanh(p["e"][ids]) @ p["o"].T)

    with x64():
        e = D(5, 4)
        make = curvature.value_grad_and_curvature
        tied = quick(make(loss), {"e": e}, ids)[2]
        two = quick(make(untied), {"e": e, "o": e}, ids)[2]
        layer = tied.spec.layer("e")
        assert layer.kind == "embed" and layer.tied and layer.stack == 1
        gather, logits, found = two.grams("e"), two.grams("o"), tied.grams("e")
        wanted = jnp.sum(gather.a) / 5 * gather.g[0] + jnp.trace(logits.g[0]) / 5 * logits.a[0]
        np.testing.assert_allclose(found.g[0], wanted, rtol=1e-12)
        np.testing.assert_array_equal(found.a, np.ones((1, 5)))
        raw = quick(make(loss, reducer="raw"), {"e": e}, ids)[2]
        np.testing.assert_allclose(raw.grams("e").g, found.g, rtol=1e-12)
        with pytest.raises(ValueError, match="grams"):
            raw.rows("e")


def test_hard_coded_batch_size_is_guessed_with_a_warning():
    def loss(p, x):
        return square(x.reshape(6, 4) @ p["w"])

    with pytest.warns(UserWarning, match="retrace with a doubled batch failed .*batch_argnums="):
        spec = spec_of(loss, {"w": W}, X)
    assert spec.leaf("w").status == "full"


def test_nothing_matched():
    with pytest.raises(ValueError, match="no parameter leaf was matched:\nparameter"):
        spec_of(lambda p, x: square(x @ jnp.exp(p["w"])), {"w": W}, X)


def test_results_and_arguments_are_checked():
    capture = curvature.value_grad_and_curvature
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(6, 3\)"):
        capture(lambda p, x: x @ p["z"])({"z": V}, X)
    with pytest.raises(ValueError, match="has_aux=True"):
        capture(lambda p, x: (square(x @ p["z"]), 1.0))({"z": V}, X)
    with pytest.raises(ValueError, match="array and aux"):
        capture(lambda p, x: square(x @ p["z"]), has_aux=True)({"z": V}, X)
    with pytest.raises(ValueError, match="parameter 'n' is int32"):
        capture(lambda p, x: square(x @ p["z"]))({"z": V, "n": jnp.int32(3)}, X)
    with pytest.raises(ValueError, match="no batch axis"):
        capture(lambda p, x: square(X @ p["z"]) * x)({"z": V}, 1.0)
    with pytest.raises(ValueError, match="reducer must be one of"):
        capture(square, reducer="full")
    with pytest.raises(ValueError, match="reduction must be"):
        capture(square, reduction="average")


def test_fallback_leaves_are_logged_once(caplog):
    loss = with_head(lambda p, x: x @ jnp.exp(p["w"]))
    step = curvature.value_grad_and_curvature(loss)
    with caplog.at_level("INFO"):
        step({"w": W, "z": V}, X)
        step({"w": W, "z": V}, X)
    told = [r.getMessage() for r in caplog.records if "status none" in r.getMessage()]
    assert len(told) == 1 and "leaf 'w'" in told[0] and "fallback" in told[0]


def test_mapped_over_an_ensemble():
    """Every member of an ensemble equals its own run."""
    loss = lambda p, x: square(jnp.tanh(x @ p["w"] + p["b"]) @ p["z"])  # noqa: E731
    step = curvature.value_grad_and_curvature(loss)
    members = [{"w": D(4, 4), "b": D(4), "z": D(4, 3)} for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = quick(jax.vmap(lambda p: step(p, X)[2].grams("w")), stacked)
    for i, p in enumerate(members):
        alone = quick(lambda p: step(p, X)[2].grams("w"), p)
        np.testing.assert_allclose(together.a[i], alone.a, rtol=1e-5)
        np.testing.assert_allclose(together.g[i], alone.g, rtol=1e-4, atol=1e-6)


def test_python_constants_stay_constants():
    def loss(p, x, train, name):
        assert name == "net"
        return square(x @ p["z"]) if train else 0.0

    _, _, curv = curvature.value_grad_and_curvature(loss)({"z": V}, X, True, "net")
    assert "z" in curv


def test_shard_map_inside_the_loss_is_opaque():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    product = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d")
    )
    loss = with_head(lambda p, x: product(p["w"], x))
    params = {"w": W, "z": V}
    found = spec_of(loss, params, X)
    assert found.leaf("w").status == "none" and "shard_map" in found.leaf("w").reasons[0]
    _, grads, _ = jax.jit(curvature.value_grad_and_curvature(loss))(params, X)
    np.testing.assert_allclose(grads["w"], jax.jit(jax.grad(loss))(params, X)["w"], rtol=1e-5)
