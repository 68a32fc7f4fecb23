"""Reducers, gates, scaling, precision, micro-batches."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax import curvature
from tests.curvature import zoo
from tests.curvature.zoo import draw, quick, square
from tests.x64 import x64


def capture(loss, params, batch, **kw):
    return quick(curvature.value_grad_and_curvature(loss, **kw), params, *batch)[2]


def assert_equal(one, two, rtol=1e-12):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(a), initial=1e-9))


@pytest.mark.parametrize("name", ["attention", "conv_grouped", "scanned_remat", "python_indexed"])
def test_reducers_agree_with_raw_rows(name):
    with x64():
        loss, params, batch = zoo.ENTRIES[name]()
        make = curvature.value_grad_and_curvature

        def everything(params, *batch):
            names = ("raw", "kron", "kron_reduce", "diag")
            raw, kron, reduced, diagonal = (make(loss, reducer=n)(params, *batch)[2] for n in names)
            out = []
            for path in (layer.path for layer in raw.spec.layers):
                rows, wanted = raw.rows(path, "reduce"), raw.grams(path, "reduce")
                full = raw.grams(path)
                diagonals = [jnp.diagonal(x, axis1=1, axis2=2) for x in full]
                out += [(kron.grams(path), full), (reduced.grams(path, "reduce"), wanted)]
                out += [(kron.grams(path, bias=False), raw.grams(path, bias=False))]
                out += [(jnp.swapaxes(rows.a, 1, 2) @ rows.a, wanted.a)]
                out += [(list(diagonal.grams(path)), diagonals)]
            return out

        for found, wanted in quick(everything, params, *batch):
            assert_equal(found, wanted)


def test_tnt_moments_are_those_of_example_gradients():
    for name in ("conv", "merged_batch"):
        with x64():
            loss, params, batch = zoo.ENTRIES[name]()
            curv = capture(loss, params, batch, reducer="tnt")
            layer = curv.spec.layers[0]
            part = curv.stats[layer.path][0]

            def moments(params, x, loss=loss, layer=layer):
                g = jax.vmap(lambda x: jax.grad(loss)(params, x[None])[layer.path])(x)
                w = jax.vmap(layer.to_matrix)(g)[:, 0]
                return jnp.einsum("nij,nkj->ik", w, w), jnp.einsum("nij,nik->jk", w, w)

            left, right = quick(moments, params, *batch)
            assert_equal((part["L"][0], part["R"][0]), (left, right))


def test_sides_above_max_dim_are_diagonal():
    loss, params, batch = zoo.mlp()
    curv = capture(loss, params, batch, reducer=curvature.Reducer("kron", max_dim=5))
    assert curv.grams("w1").a.shape == (1, 5, 5) and curv.grams("w1").g.shape == (1, 6)
    assert curv.grams("w2").a.shape == (1, 7)


def test_update_stats_switches_the_statistics_only():
    loss, params, batch = zoo.scanned_remat()
    step = jax.jit(curvature.value_grad_and_curvature(loss))
    value, grads, on = step(params, *batch, update_stats=jnp.asarray(True))
    value2, grads2, off = step(params, *batch, update_stats=jnp.asarray(False))
    assert on.fresh and not off.fresh and value == value2
    jax.tree.map(np.testing.assert_array_equal, grads, grads2)
    assert all(not np.any(x) for held in off.stats.values() for x in jax.tree.leaves(held))
    plain = curvature.value_grad_and_curvature(loss)
    static = quick(lambda p, x: plain(p, x, update_stats=False), params, *batch)[2]
    assert not static.fresh and not np.any(static.stats["out"][0]["A"])
    always = capture(loss, params, batch)
    assert_equal(on.grams("out"), always.grams("out"), rtol=1e-5)
    assert np.all(np.isfinite(off.grams("out").a))  # nothing counted: no division by zero


def flops(fn, *args):
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def test_unused_statistics_cost_nothing():
    loss, params, batch = zoo.mlp()
    step = curvature.value_grad_and_curvature(loss)
    plain = flops(jax.value_and_grad(loss), params, *batch)
    unused = flops(lambda p, x: step(p, x)[:2], params, *batch)
    used = flops(step, params, *batch)
    assert unused <= plain * 1.001 < used


def test_jit_and_eager_agree():
    loss, params, batch = zoo.mlp()
    step = curvature.value_grad_and_curvature(loss)
    eager, jitted = step(params, *batch)[2], jax.jit(step)(params, *batch)[2]
    assert eager.spec == jitted.spec
    for layer in eager.spec.layers:
        assert_equal(eager.grams(layer.path), jitted.grams(layer.path), rtol=1e-4)


def test_sum_loss_scale_and_loss_terms():
    with x64():
        loss, params, batch = zoo.mlp()
        mean = capture(loss, params, batch).grams("w1").g
        total = capture(lambda p, x: 8 * loss(p, x), params, batch, reduction="sum")
        assert_equal(total.grams("w1").g, mean)
        step = curvature.value_grad_and_curvature(lambda p, x: 1024 * loss(p, x))
        scaled = quick(lambda p, x: step(p, x, loss_scale=1024.0), params, *batch)[2]
        assert_equal(scaled.grams("w1").g, mean)
        doubled = capture(loss, params, batch, loss_terms=16).grams("w1").g
        assert_equal(doubled, 2 * mean)


@pytest.mark.parametrize("reducer", ["kron", "kron_reduce", "raw"])
def test_micro_batches_add_up(reducer):
    with x64():
        loss, params, (x,) = zoo.merged_batch()
        whole = capture(loss, params, (x,), reducer=reducer)
        one = capture(loss, params, (x[:4],), reducer=reducer)
        two = capture(loss, params, (x[4:],), reducer=reducer)
        approx = "reduce" if reducer == "kron_reduce" else "expand"
        assert_equal((one + two).grams("w", approx), whole.grams("w", approx))
        assert (one + two).terms == 6


def test_accumulated_micro_batches():
    with x64():
        loss, params, (x,) = zoo.merged_batch()
        accumulator = curvature.accumulate_curvature(3)
        parts = [capture(loss, params, (x[i : i + 2],)) for i in (0, 2, 4)]
        state = accumulator.init(parts[0])
        for _ in range(2):  # the second round starts from nothing
            for part in parts:
                total, state = jax.jit(accumulator.update)(part, state)
            assert_equal(total.grams("w"), capture(loss, params, (x,)).grams("w"))
        with pytest.raises(ValueError, match="raw statistics grow"):
            accumulator.init(capture(loss, params, (x,), reducer="raw"))
        with pytest.raises(ValueError, match="k >= 1"):
            curvature.accumulate_curvature(0)


def test_masked_positions_do_not_count():
    with x64():
        d = draw(40)
        params, x = {"w": d(4, 3), "b": d(3)}, d(5, 6, 4)
        keep = jnp.asarray(np.random.default_rng(0).random((5, 6)) < 0.7)

        def loss(p, x, keep):
            return jnp.sum(keep[..., None] * jnp.sin(x @ p["w"] + p["b"])) / jnp.sum(keep)

        a = jnp.concatenate([x, jnp.ones((5, 6, 1))], -1)[keep]
        for name in ("kron", "raw"):
            reducer = curvature.Reducer(name, mask_zero_g=True)
            curv = capture(loss, params, (x, keep), reducer=reducer)
            assert curv.stats["w"][0]["P"] == jnp.sum(keep)
            assert_equal(curv.grams("w").a[0], a.T @ a / jnp.sum(keep))
        summed = curvature.Reducer("kron_reduce", mask_zero_g=True)
        raw = capture(loss, params, (x, keep), reducer=reducer)
        reduced = capture(loss, params, (x, keep), reducer=summed)
        assert_equal(reduced.grams("w", "reduce"), raw.grams("w", "reduce"))


def test_extra_reaches_a_custom_reducer_inside_a_scan():
    """K^T A K of every layer of a rematerialised scan, K given per layer."""
    with x64():
        loss, params, batch = zoo.scanned_remat()
        k = {"layers/w": draw(41)(3, 4, 2)}

        def project(layer, a, g, extra):
            if extra is None:
                return {"n": jnp.sum(jnp.square(g), (1, 2))}
            ak = jnp.einsum("snri,sij->snrj", a, extra)
            return {"KAK": jnp.einsum("snri,snrj->sij", ak, ak), "gg": jnp.sum(g**2, (1, 2))}

        step = jax.jit(curvature.value_grad_and_curvature(loss, reducer=project))
        curv = step(params, *batch, extra=k)[2]
        kron = capture(loss, params, batch)
        a = kron.stats["layers/w"][0]["A"]
        wanted = jnp.einsum("sik,sij,sjl->skl", k["layers/w"], a, k["layers/w"])
        assert_equal(curv.stats["layers/w"][0]["KAK"], wanted)
        g = jnp.diagonal(kron.stats["layers/w"][0]["G"], axis1=1, axis2=2)
        assert_equal(curv.stats["layers/w"][0]["gg"], g)
        with pytest.raises(ValueError, match=r"extra= names no layers: \['nothing'\]"):
            step(params, *batch, extra={"nothing": 1.0})


def test_half_precision_model_gives_float32_statistics():
    loss, params, (x,) = zoo.mlp()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    curv = capture(loss, half, (x.astype(jnp.bfloat16),))
    full = capture(loss, params, (x,))
    for side in ("a", "g"):
        one, two = getattr(curv.grams("w1"), side), getattr(full.grams("w1"), side)
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, two, atol=0.05 * float(jnp.abs(two).max()))
    raw = capture(loss, half, (x.astype(jnp.bfloat16),), reducer="raw")
    assert raw.stats["w1"][0]["a"].dtype == jnp.bfloat16 and raw.rows("w1").a.dtype == jnp.float32


def test_wrong_approximation_of_sums_is_refused():
    loss, params, batch = zoo.merged_batch()
    with pytest.raises(ValueError, match="reducer='kron_reduce' or 'raw'"):
        capture(loss, params, batch).grams("w", approx="reduce")
    with pytest.raises(ValueError, match="reducer='kron' or 'raw'"):
        capture(loss, params, batch, reducer="kron_reduce").grams("w")
    with pytest.raises(ValueError, match="approx must be"):
        capture(loss, params, batch).grams("w", approx="mean")
    with pytest.raises(ValueError, match="reducer='raw'"):
        capture(loss, params, batch).rows("w")


def test_expand_is_exact_for_a_linear_net_with_summed_positions():
    """Deep linear net, squared loss summed over positions: A (x) G is the Gauss-Newton block."""
    with x64():
        d = draw(42)
        params, x = {"w": d(3, 3), "v": d(3, 2)}, d(4, 5, 3)
        model = lambda p, x: (x @ p["w"]) @ p["v"]  # noqa: E731
        step = curvature.model_value_grad_and_curvature(
            model, curvature.losses.squared_error(event_dims=2), fisher="exact"
        )
        grams = quick(step, params, x, jnp.zeros((4, 5, 2)))[2].grams("w")
        jacobian = quick(jax.jacobian(lambda w: model({**params, "w": w}, x)), params["w"])
        flat = jacobian.reshape(-1, 9)
        assert_equal(jnp.kron(grams.a[0], grams.g[0]), flat.T @ flat / 4)


def test_dropout_key_is_an_argument_like_any_other():
    d = draw(43)
    params, x = {"w": d(4, 6), "v": d(6, 3)}, d(8, 4)

    def loss(p, x, key):
        h = jnp.tanh(x @ p["w"])
        kept = jax.random.bernoulli(key, 0.7, h.shape)
        h = jax.ad_checkpoint.checkpoint_name(jnp.where(kept, h / 0.7, 0), "hidden")
        return square(h @ jax.ad_checkpoint.checkpoint_name(p["v"], "weight"))

    key = jax.random.key(0)
    value, grads, curv = quick(curvature.value_grad_and_curvature(loss), params, x, key)
    value0, grads0 = quick(jax.value_and_grad(loss), params, x, key)
    assert all(leaf.status == "full" for leaf in curv.spec.leaves), str(curv.spec)
    np.testing.assert_allclose(value, value0, rtol=1e-6)
    assert_equal(grads, grads0, rtol=1e-5)


def test_statistics_that_were_not_taken_do_not_dilute_a_sum():
    loss, params, batch = zoo.mlp()
    step = jax.jit(curvature.value_grad_and_curvature(loss))
    on = step(params, *batch, update_stats=jnp.asarray(True))[2]
    off = step(params, *batch, update_stats=jnp.asarray(False))[2]
    both = on + off
    assert both.fresh
    assert_equal(both.grams("w1"), on.grams("w1"), rtol=1e-6)
