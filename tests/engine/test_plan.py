"""Shapes to plans: what is a matrix, and what is said where it cannot be one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from kradagrad_jax.engine import trees
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.parts import merge_dims
from kradagrad_jax.engine.plan import block_origins, owners
from tests.engine.planning import MUON, S, entries, keys, plan_for, reasons


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
    assert merge_dims(shape, Layout(merge=merge, merge_cap=cap)) == expected


# ---- what is a vector


def test_vectors_biases_and_scalars():
    params = {
        "query": {"kernel": S(48, 4, 12), "bias": S(4, 12)},
        "norm": {"scale": S(48)},
        "t": S(),
        "one": S(1),
        "layers": {"bias": S(3, 4, 12), "scale": S(3, 48)},
    }
    layout = {"stacked": "layers"}
    assert reasons(plan_for(params, Layout(**layout))) == {
        "query/bias": "bias",
        "norm/scale": "vector",
        "t": "scalar",
        "one": "scalar",
        "layers/bias": "bias",
        "layers/scale": "vector",
    }
    found = entries(plan_for(params, Layout(vectors="block", scalars="block", **layout)))
    merged = {p: (e.stack, e.merged) for p, e in found.items()}
    assert merged["query/bias"] == (1, (48,))
    assert merged["layers/bias"] == merged["layers/scale"] == (3, (48,))
    assert merged["t"] == merged["one"] == (1, (1,))
    assert entries(plan_for(params, Layout(biases=None)))["query/bias"].merged == (4, 12)


# ---- stacks


def test_stack_axes_by_pattern_mapping_function_and_place():
    params = {"h": {"w": S(3, 5, 7), "v": S(5, 3, 7), "e": S(2, 5, 7, 3)}}
    given = {
        "pattern": "h/w",
        "mapping": {"h/w": 0, "h/v": 1, "h/e": (0, -1)},
        "function": lambda path, shape: {"h/w": True, "h/v": 1, "h/e": (0, 3)}[path],
    }
    stacks = {
        name: {
            p: (e.stack, e.merged) for p, e in entries(plan_for(params, Layout(stacked=s))).items()
        }
        for name, s in given.items()
    }
    assert stacks["mapping"] == {"h/w": (3, (5, 7)), "h/v": (3, (5, 7)), "h/e": (6, (5, 7))}
    assert stacks["function"] == stacks["mapping"]
    assert stacks["pattern"]["h/w"] == (3, (5, 7))
    assert stacks["pattern"]["h/v"] == (1, (15, 7))


def test_muon_dimension_numbers():
    numbers = MUON
    params = {"a": S(3, 4, 5, 6), "b": S(7, 8), "c": S(4, 5), "layers": [S(6, 5, 4)]}
    tree = {"a": numbers((0, 1), -1), "b": numbers(1, 0), "c": None, "layers": [numbers()]}
    layout = Layout(stacked=tree)
    plan = plan_for(params, layout)
    found = {p: (e.stack, e.merged, e.order) for p, e in entries(plan).items()}
    assert found == {
        "a": (5, (12, 6), (2, 0, 1, 3)),
        "b": (1, (8, 7), (1, 0)),
        "layers/0": (4, (6, 5), (2, 0, 1)),
    }
    assert reasons(plan) == {"c": "no MuonDimensionNumbers"}
    assert hash(layout) == hash(Layout(stacked=tree))
    with pytest.raises(ValueError, match="no MuonDimensionNumbers for parameter 'other'"):
        plan_for({"other": S(3, 4)}, layout)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        initializer = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
        x = nn.Dense(7, kernel_init=initializer, use_bias=False)(x)
        initializer = nn.with_logical_partitioning(nn.initializers.ones, ("mlp", "embed"))
        return nn.Dense(5, kernel_init=initializer, use_bias=False)(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="h")(x, None)[0]


def test_names_of_flax_boxes():
    params = jax.eval_shape(Scanned().init, jax.random.key(0), jnp.ones((2, 5)))["params"]
    assert trees.names_of(params) == [("embed", "layers", "mlp"), ("mlp", "layers", "embed")]
    found = entries(plan_for(params))
    assert {p: (e.stack, e.merged) for p, e in found.items()} == {
        "h/Dense_0/kernel": (3, (5, 7)),
        "h/Dense_1/kernel": (3, (7, 5)),
    }
    # what is said about a leaf goes before its names
    found = entries(plan_for(params, Layout(stacked={"Dense_0": None})))
    assert [e.stack for e in found.values()] == [1, 3]
    found = entries(plan_for(params, Layout(stacked_names=("embed",))))
    assert [e.stack for e in found.values()] == [5, 5]


def test_names_of_nnx_variables():
    param = nnx.Param(jnp.ones((5, 3, 7)))
    if not hasattr(nnx.Variable, "set_metadata"):
        pytest.skip("this flax sets metadata of variables otherwise")
    param.set_metadata(out_sharding=(None, "layers", "mlp"))
    plain = nnx.Param(jnp.ones((4, 6)))
    tree = {"boxed": param, "plain": plain, "array": jnp.ones((2, 3))}
    assert trees.names_of(tree) == [None, (None, "layers", "mlp"), None]
    assert entries(plan_for(tree))["boxed"].stack == 3


def test_names_count_masked_leaves():
    tree = {"a": optax.MaskedNode(), "b": S(3, 4)}
    assert trees.names_of(tree) == [None, None]


# ---- split


def test_equal_parts_are_a_stack_and_unequal_ones_are_regions():
    params = {"qkv": {"kernel": S(8, 12), "bias": S(12)}, "gate": {"kernel": S(8, 12)}}
    layout = Layout(split={"qkv": {-1: 3}, "gate": (1, (4, 6))}, vectors="block", block_size=None)
    plan = plan_for(params, layout)
    found = {(e.paths, e.region): (e.stack, e.merged) for e in plan.covered}
    assert found == {
        (("qkv/kernel",), None): (3, (8, 4)),
        (("qkv/bias",), None): (3, (4,)),
        (("gate/kernel",), (1, 0, 4)): (1, (8, 4)),
        (("gate/kernel",), (1, 4, 6)): (1, (8, 2)),
        (("gate/kernel",), (1, 6, 12)): (1, (8, 6)),
    }
    ids, number = owners(plan)
    assert number == 9
    assert sorted(np.concatenate(list(ids.values()))) == list(range(9))
    # equal cut points are equal parts
    assert plan_for({"qkv": S(8, 12)}, Layout(split={"qkv": {1: (4, 8)}})).covered[0].stack == 3


def test_owners_and_origins_name_every_block():
    params = {"a": S(3, 8, 9), "b": S(3, 8, 9)}
    plan = plan_for(params, Layout(block_size=4, stacked="."))
    ids, number = owners(plan)
    assert number == 6
    origins = {
        b.key: [o for slot in b.slots for o in block_origins(plan, slot)] for b in plan.buckets
    }
    for bucket in plan.buckets:
        assert len(origins[bucket.key]) == bucket.size == len(ids[bucket.key])
        assert [3 * o.index + o.layer for o in origins[bucket.key]] == list(ids[bucket.key])
    every = [(o.index, o.layer, o.first) for found in origins.values() for o in found]
    grid = itertools.product(range(2), range(3), itertools.product((0, 4), (0, 3, 6)))
    assert sorted(every) == sorted(grid)


# ---- joined


def test_joined_is_one_block_of_the_widest_dtype():
    params = {"a": S(3, 4), "b": S(), "c": S(5, dtype=jnp.bfloat16), "no": S(7), "e": S(0, 3)}
    plan = plan_for(params, Layout(joined=True, include="^[abce]$"))
    ((name, size),) = keys(plan).items()
    assert name.startswith("18 ") and size == 1  # a mark of paths and shapes follows
    assert plan.buckets[0].shape == (18,)
    assert plan.buckets[0].dtype == jnp.float32
    assert reasons(plan) == {"no": "excluded by Layout.include", "e": "empty"}
    assert owners(plan)[1] == 1


# ---- errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"merge": "all"}, "merge"),
        ({"block_size": 0}, "block_size"),
        ({"pieces": "odd"}, "pieces"),
        ({"split": "tail"}, "Layout.pieces"),
        ({"split": {"w": {0: "x"}}}, "Layout.split"),
        ({"vectors": "dense"}, "vectors"),
        ({"scalars": "dense"}, "scalars"),
        ({"state_limit": 0}, "state_limit"),
        ({"modes": "both"}, "Layout.modes"),
        ({"modes": {"w": "both"}}, "Layout.modes"),
        ({"stacked": 3}, "Layout.stacked"),
        ({"stacked": {"w": 1.5}}, "Layout.stacked"),
    ],
)
def test_bad_layouts_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Layout(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"include": "nowhere"}, r"Layout.include: the pattern 'nowhere'"),
        ({"stacked": "nowhere"}, r"Layout.stacked: the pattern 'nowhere'"),
        ({"stacked": {"w": 0, "nowhere": 1}}, r"Layout.stacked: the pattern 'nowhere'"),
        ({"split": {"nowhere": {0: 2}}}, r"Layout.split: the pattern 'nowhere'"),
        ({"modes": {"nowhere": "input"}}, r"Layout.modes: the pattern 'nowhere'"),
        ({"stacked": {"w": 2}}, r"'w' has shape \(4, 6\): Layout.stacked"),
        ({"stacked": {"w": (0, -2)}}, r"'w' has shape \(4, 6\): Layout.stacked"),
        ({"split": {"w": {2: 2}}}, r"'w' has shape \(4, 6\): Layout.split"),
        ({"split": {"w": {1: 4}}}, r"'w'.* 4 equal parts of axis 1"),
        ({"split": {"w": {1: (2, 6)}}}, r"'w'.*cut points \(2, 6\)"),
        ({"split": {"w": {1: (3, 2)}}}, r"'w'.*cut points \(3, 2\)"),
        ({"split": {"w": {0: (1,), 1: (1,)}}}, r"'w'.*more than one axis"),
        ({"split": {"w": {0: 2}}, "stacked": "w"}, r"'w'.*stacks layers"),
        ({"joined": True, "group": lambda path, shape: path}, "several methods"),
    ],
)
def test_what_does_not_fit_the_parameters_is_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        plan_for({"w": S(4, 6), "v": S(4, 6)}, Layout(**kwargs))
    assert not plan_for({}, Layout(**kwargs)).buckets


def test_layouts_with_mappings_are_hashable_and_stay_as_they_are():
    layout = Layout(
        stacked={"w": [0, 1]}, modes={"w": [True, False]}, split={"v": {0: (1,)}},
        stacked_names=["layers"],
    )  # fmt: skip
    again = dataclasses.replace(layout, block_size=256)
    assert again == layout
    assert hash(again) == hash(layout)
