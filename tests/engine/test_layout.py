"""Shapes to blocks and back: the layout is static and loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kradagrad_jax.engine.options import plan_of

import kradagrad_jax as kj
from kradagrad_jax.engine import buckets
from kradagrad_jax.engine.layout import merge_dims

LAYOUTS = [
    kj.Layout(block_size=4),
    kj.Layout(block_size=4, pieces="tail"),
    kj.Layout(block_size=5, merge="none", vectors="block"),
    kj.Layout(block_size=7, merge="greedy", vectors="block", pieces="tail"),
    kj.Layout(block_size=None),
    kj.Layout(block_size=3, stacked="stacked"),
]


def tree():
    shapes = {
        "w": (7, 5),
        "k": (3, 2, 2, 5),
        "v": (9,),
        "scalar": (),
        "one": (1,),
        "row": (1, 6),
        "stacked": (3, 4, 5),
        "empty": (0, 3),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gather_then_scatter_is_the_identity(layout):
    params = tree()
    plan, leaves = plan_of(params, layout), jax.tree.leaves(params)
    covered = [leaves[leaf.index] for leaf in plan.covered]
    stacks = buckets.gather(plan, covered)
    for bucket in plan.buckets:
        assert stacks[bucket.key].shape == (bucket.size, *bucket.shape)
        assert layout.block_size is None or max(bucket.shape) <= layout.block_size
    for x, y in zip(covered, buckets.scatter(plan, stacks), strict=True):
        np.testing.assert_array_equal(x, y)
    total = sum(bucket.size * int(np.prod(bucket.shape)) for bucket in plan.buckets)
    assert total == sum(x.size for x in covered)
    assert len(plan.covered) + len(plan.uncovered) == len(leaves)


@pytest.mark.parametrize(
    ("shape", "merge", "cap", "expected"),
    [
        ((16, 16, 3, 3), "greedy", 128, (16, 48, 3)),
        ((4, 3), "greedy", 128, (12,)),
        ((1, 1), "greedy", 128, ()),
        ((4, 3), "matrix", None, (4, 3)),
        ((3, 3, 64, 64), "matrix", None, (576, 64)),
        ((256, 8, 32), "matrix", None, (256, 256)),
        ((8, 32, 256), "matrix", None, (256, 256)),
        ((1, 5, 1), "matrix", None, (5,)),
        ((3, 1, 4), "none", None, (3, 1, 4)),
    ],
)
def test_merging(shape, merge, cap, expected):
    assert merge_dims(shape, kj.Layout(merge=merge, merge_cap=cap)) == expected


def test_blocks_come_first_mode_slowest():
    params = {"w": jnp.arange(35.0).reshape(7, 5)}
    layout = kj.Layout(block_size=4, pieces="tail")
    state = kj.scale_by_shampoo(layout=layout, beta1="none", graft="none").init(params)
    from kradagrad_jax.engine import block_factors

    shapes = [
        tuple(s.shape[0] for s in f.statistics) for f in block_factors(state, params, layout)["w"]
    ]
    assert shapes == [(4, 4), (4, 1), (3, 4), (3, 1)]


def test_number_of_buckets_does_not_grow_with_depth():
    def model(depth):
        return {f"layer{i}": jnp.zeros((12, 8)) for i in range(depth)}

    sizes = [len(plan_of(model(d), kj.Layout(block_size=4)).buckets) for d in (2, 20)]
    assert sizes[0] == sizes[1] == 1


def test_describe_names_every_parameter():
    text = str(kj.describe(tree(), kj.Layout(block_size=4, stacked="stacked")))
    for expected in ("w", "stacked", "fallback (vector)", "fallback (scalar)", "fallback (empty)"):
        assert expected in text
    shapes = jax.eval_shape(tree)
    assert str(kj.describe(shapes, kj.Layout(block_size=4, stacked="stacked"))) == text


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"merge": "all"}, "merge"),
        ({"block_size": 0}, "block_size"),
        ({"split": "odd"}, "split"),
        ({"vectors": "dense"}, "vectors"),
    ],
)
def test_bad_layouts_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        kj.Layout(**kwargs)


def test_include_and_max_dim_leave_parameters_to_the_fallback():
    params = {"head": jnp.zeros((4, 3)), "body": jnp.zeros((4, 3)), "table": jnp.zeros((100, 3))}
    plan = plan_of(params, kj.Layout(include="body|table", max_dim=50))
    assert [leaf.path for leaf in plan.covered] == ["body"]
    assert {(path, reason) for _, path, _, reason in plan.uncovered} == {
        ("head", "excluded by Layout.include"),
        ("table", "mode of 100 > max_dim"),
    }


def test_too_many_stacked_axes_name_the_parameter():
    layout = kj.Layout(stacked=lambda path, shape: 3)
    with pytest.raises(ValueError, match="parameter 'w'"):
        plan_of({"w": jnp.zeros((2, 3))}, layout)
