"""Layers, specifications and hand-made statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
from tests.x64 import x64

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape))


LAYERS = [
    Layer.dense("w", (3, 2)),
    Layer.dense("w", (3, 2), bias="b"),
    Layer.dense("w", (4, 3, 2), bias="b"),
    Layer.dense("w", (2, 3), bias="b", transposed=True),
    Layer.dense("w", (4, 2, 3), bias="b", transposed=True),
    Layer.conv("w", (3, 2, 4, 6), bias="b"),
    Layer.conv("w", (3, 2, 4, 6), bias="b", groups=3),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_pack_and_unpack_are_inverse(layer):
    weight = draw(*layer.shape)
    bias = None if layer.bias is None else draw(*layer.bias_shape)
    matrix = layer.pack(weight, bias)
    assert matrix.shape == (layer.stack, layer.d_in + (bias is not None), layer.d_out)
    w, b = layer.unpack(matrix)
    np.testing.assert_array_equal(w, weight)
    if bias is not None:
        np.testing.assert_array_equal(b, bias)
    np.testing.assert_array_equal(layer.from_matrix(layer.to_matrix(weight)), weight)


def test_grouped_kernel_lies_as_documented():
    layer = Layer.conv("w", (1, 1, 2, 6), groups=3)
    weight = jnp.arange(12.0).reshape(1, 1, 2, 6)
    np.testing.assert_array_equal(layer.to_matrix(weight)[1], [[2, 3], [8, 9]])


def test_layers_and_specs_are_hashable_and_printable():
    spec = CaptureSpec.from_layers(LAYERS[1:2])
    assert hash(spec) == hash(CaptureSpec.from_layers(LAYERS[1:2]))
    assert "with bias b" in str(spec) and "bias of w" in str(spec)
    assert spec.layer("w").bias == "b"


def test_messages_of_a_wrong_path():
    spec = CaptureSpec.from_layers(LAYERS[1:2])
    with pytest.raises(KeyError, match="no parameter 'x'"):
        spec.layer("x")
    with pytest.raises(KeyError, match="bias of layer 'w'"):
        spec.layer("b")
    empty = Curvature.from_rows({}, spec)
    with pytest.raises(KeyError, match="holds no statistics of 'w'"):
        empty.grams("w")


def test_wrong_leaf_shape_is_named():
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 2\), got \(3, 3\)"):
        LAYERS[0].pack(draw(3, 3))


@pytest.mark.parametrize("stacked", [False, True])
def test_rows_given_by_hand(stacked):
    with x64():
        spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2), bias="b")])
        a, g = draw(5, 3), draw(5, 2)
        given = (a[None], g[None]) if stacked else (a, g)
        c = Curvature.from_rows({"w": given}, spec)
        rows = c.rows("w")
        np.testing.assert_allclose(rows.a[0, :, :3], a)
        np.testing.assert_allclose(rows.a[0, :, 3], 1 / np.sqrt(5))
        np.testing.assert_allclose(rows.g[0], g)
        np.testing.assert_allclose(c.rows("w", bias=False).a[0], a)
        np.testing.assert_allclose(c.grams("w").a[0], rows.a[0].T @ rows.a[0])
        np.testing.assert_allclose(c.grams("w", approx="reduce").g[0], g.T @ g)
        np.testing.assert_allclose(c.grams("w", bias=False).a[0], a.T @ a)


def test_rows_with_the_bias_column_given():
    spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2), bias="b")])
    a, g = draw(5, 4), draw(5, 2)
    c = Curvature.from_rows({"w": (a, g)}, spec)
    np.testing.assert_allclose(c.rows("w").a[0], a)
    np.testing.assert_allclose(c.rows("w", bias=False).a[0], a[:, :3])


def test_factors_given_by_hand():
    layer = Layer.dense("w", (3, 2), bias="b")
    spec = CaptureSpec.from_layers([layer])
    a, g = draw(4, 4), draw(2, 2)
    c = Curvature.from_grams({"w": (a, g)}, spec)
    np.testing.assert_allclose(c.grams("w").a[0], a)
    np.testing.assert_allclose(c.grams("w", bias=False).a[0], a[:3, :3])
    np.testing.assert_allclose(c.grams("w", approx="reduce").g[0], g)
    diagonal = Curvature.from_grams({"w": (jnp.diag(a), jnp.diag(g))}, spec)
    np.testing.assert_allclose(diagonal.grams("w").a, jnp.diag(a)[None])
    with pytest.raises(ValueError, match="no row for the bias"):
        Curvature.from_grams({"w": (a[:3, :3], g)}, spec).grams("w")
    with pytest.raises(ValueError, match="raw statistics"):
        c.rows("w")
    with pytest.raises(ValueError, match="shapes"):
        Curvature.from_grams({"w": (a, a)}, spec)


def test_addition_pools_and_cotangents_scale():
    with x64():
        spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2))])
        (a1, g1), (a2, g2) = (draw(5, 3), draw(5, 2)), (draw(7, 3), draw(7, 2))
        one = Curvature.from_rows({"w": (a1, g1)}, spec)
        two = Curvature.from_rows({"w": (a2, g2)}, spec)
        both = (one + two).grams("w")
        np.testing.assert_allclose(both.a[0], (a1.T @ a1 + a2.T @ a2) / 2)
        np.testing.assert_allclose(both.g[0], (g1.T @ g1 + g2.T @ g2) / 2)
        assert (one + two).rows("w").a.shape == (1, 12, 3)
        np.testing.assert_allclose(one.scale_cotangents(3.0).grams("w").g[0], 9 * g1.T @ g1)
        np.testing.assert_allclose(one.scale_cotangents(3.0).rows("w").g[0], 3 * g1)


def test_curvature_passes_through_jit():
    spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2))])
    c = Curvature.from_rows({"w": (draw(5, 3), draw(5, 2))}, spec)
    out = jax.jit(lambda c: c.scale_cotangents(2.0))(c)
    assert out.spec == spec and out.fresh
    np.testing.assert_allclose(out.rows("w").g, 2 * c.rows("w").g)
