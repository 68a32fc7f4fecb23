"""Shapes to plans: what is a matrix, which modes have a factor, what is said where it cannot be."""

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
from kradagrad_jax.engine.parts import merge_dims, state_numbers
from kradagrad_jax.engine.plan import block_origins, owners
from kradagrad_jax.engine.undeclared import undeclared_stacks
from tests.engine.planning import plan_for


def S(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def dense(*shape):
    return {"kernel": S(*shape), "bias": S(*shape[:-2], shape[-1])}


def gpt2(layers):
    def layer():
        out = {n: {"scale": S(768), "bias": S(768)} for n in ("ln1", "ln2")}
        kernels = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}
        return out | {n: dense(*s) for n, s in kernels.items()}

    return {"wte": S(50257, 768), "wpe": S(1024, 768)} | {f"h{i}": layer() for i in range(layers)}


def entries(plan):
    return {path: entry for entry in plan.covered for path in entry.paths}


def reasons(plan):
    return {path: reason for _, path, _, reason in plan.uncovered}


def keys(plan):
    return {bucket.key: bucket.size for bucket in plan.buckets}


def state_per_weight(plan, layout):
    state = sum(
        len(e.indices) * e.stack * state_numbers(e.merged, e.factored, layout) for e in plan.covered
    )
    return state / sum(len(e.indices) * np.prod(e.shape) for e in plan.covered)


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


# ---- modes without a factor


def test_the_embedding_of_gpt2_is_one_sided_and_the_rest_is_not():
    plan = plan_for(gpt2(12))
    assert keys(plan) == {"256x256": 12 * 108 + 12, "50257*x256": 3}
    one_sided = [e for e in plan.covered if not all(e.factored)]
    assert [e.paths for e in one_sided] == [("wte",)]
    assert one_sided[0].reasons == ("mode of 50257 > max_dim", "")
    assert len(plan.covered) == 6
    assert set(reasons(plan).values()) == {"bias", "vector"}


def test_a_huge_embedding_is_cut_along_its_features_only():
    assert keys(plan_for({"table": S(250_000, 1024)})) == {"250000*x256": 4}


def test_without_a_mode_left_a_parameter_goes_to_the_fallback():
    plan = plan_for({"w": S(30, 40), "body": S(3, 4)}, Layout(max_dim=20))
    assert reasons(plan) == {"w": "mode of 30 > max_dim, mode of 40 > max_dim"}


def test_adapters_keep_the_factor_of_their_rank():
    adapters = {f"l{i}": {"a": S(4096, 8), "b": S(8, 4096)} for i in range(3)}
    plan = plan_for(adapters)
    assert keys(plan) == {"4096*x8": 3, "8x4096*": 3}
    assert state_per_weight(plan, Layout()) <= 8
    assert state_per_weight(plan_for(adapters, Layout(state_limit=None)), Layout()) > 60
    assert entries(plan)["l0/a"].reasons == ("state_limit", "")


def test_a_small_classifier_keeps_both_sides_of_its_head():
    sizes = (784, 512, 512, 10)
    params = {f"d{i}": dense(*pair) for i, pair in enumerate(itertools.pairwise(sizes))}
    plan = plan_for(params)
    assert all(all(e.factored) for e in plan.covered)
    head = {"head": S(256, 10)}  # alone it costs 51 numbers per weight
    assert all(plan_for(head).covered[0].factored)  # but one megabyte is never too much
    wide = {"head": S(4096, 10)}
    assert plan_for(wide).covered[0].factored == (False, True)


def test_the_limit_takes_the_most_expensive_shapes_and_no_more():
    params = {"body": S(2048, 2048), "a": S(4096, 4), "b": S(4096, 300)}
    layout = Layout(state_limit=4.3)
    factored = {p: e.factored for p, e in entries(plan_for(params, layout)).items()}
    assert factored == {"body": (True, True), "a": (False, True), "b": (True, True)}
    assert state_per_weight(plan_for(params, layout), layout) <= 4.3


def test_the_limit_is_the_same_scanned_unrolled_and_in_any_order():
    layers = range(6)
    unrolled = {f"h{i}": {"w": S(512, 512), "a": S(2048, 4), "b": S(4, 2048)} for i in layers}
    scanned = {n: S(6, *x.shape) for n, x in unrolled["h0"].items()}
    turned = dict(reversed(unrolled.items()))
    for limit in (2.0, 4.5, 8.0, 100.0):
        plans = [plan_for(t, Layout(state_limit=limit)) for t in (unrolled, turned)]
        plans.append(plan_for(scanned, Layout(state_limit=limit, stacked={".": 0})))
        assert keys(plans[0]) == keys(plans[1]) == keys(plans[2])


def test_explicit_modes_are_not_touched_by_the_limit():
    params = {"a": S(4096, 8), "b": S(4096, 8)}
    plan = plan_for(params, Layout(modes={"a": (True, True)}))
    assert {p: e.factored for p, e in entries(plan).items()} == {
        "a": (True, True),
        "b": (False, True),
    }


@pytest.mark.parametrize(
    ("modes", "shape", "factored"),
    [
        ("shorter", (5, 7), (True, False)),
        ("shorter", (5, 5), (False, True)),
        ("longer", (5, 7), (False, True)),
        ("longer", (5, 5), (True, False)),
        ("input", (5, 7), (True, False)),
        ("output", (5, 7), (False, True)),
        ((False, True), (5, 7), (False, True)),
        ((True, False, False), (5, 7), (True, True)),
        ({"w": "input", ".": "output"}, (5, 7), (True, False)),
        ({"w|v": None}, (5, 7), (True, True)),
        (lambda path, merged: "input" if merged == (5, 7) else None, (5, 7), (True, False)),
    ],
    ids=str,
)
def test_modes(modes, shape, factored):
    entry = entries(plan_for({"w": S(*shape)}, Layout(modes=modes, block_size=4)))["w"]
    assert entry.factored == factored
    for tile in entry.tiles:  # only factored modes are cut
        assert all(
            n <= 4 if f else n == d
            for n, d, f in zip(tile.sizes, entry.merged, factored, strict=True)
        )


def test_no_mode_at_all_is_a_reason():
    plan = plan_for({"w": S(5, 7)}, Layout(modes=(False, False)))
    assert reasons(plan) == {"w": "Layout.modes"}


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
    numbers = optax.contrib.MuonDimensionNumbers
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


def test_names_of_flax_boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            kernel = self.param("kernel", init, (5, 7))
            boxed = self.param(
                "stacked",
                nn.with_logical_partitioning(nn.initializers.ones, ("embed", "layers", "mlp")),
                (5, 3, 7),
            )
            return x @ kernel + boxed[:, 0, :].sum()

    params = jax.eval_shape(Boxed().init, jax.random.key(0), jnp.ones((2, 5)))["params"]
    assert trees.names_of(params) == [("embed", "mlp"), ("embed", "layers", "mlp")]
    found = entries(plan_for(params))
    assert {p: (e.stack, e.merged) for p, e in found.items()} == {
        "kernel": (1, (5, 7)),
        "stacked": (3, (5, 7)),
    }
    # what is said about a leaf goes before its names
    plan = plan_for(params, Layout(stacked={"stacked": None}))
    assert entries(plan)["stacked"].stack == 1
    assert entries(plan_for(params, Layout(stacked_names=("embed",))))["stacked"].stack == 5


def test_names_of_nnx_variables():
    param = nnx.Param(jnp.ones((5, 3, 7)))
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
    assert keys(plan) == {"18": 1}
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


# ---- stacks of which nothing was said


def look(params, layout=None):
    paths = trees.paths_of(params)
    shapes = [x.shape for x in jax.tree.leaves(params)]
    return undeclared_stacks(paths, shapes, trees.names_of(params), layout or Layout())


SCANNED = {"blocks": {"fc": dense(12, 768, 3072), "ln": {"scale": S(12, 768)}}, "wte": S(99, 768)}
MAXTEXT = {"blocks": {"wi": S(768, 12, 3072), "ln": {"scale": S(768, 12)}}, "wte": S(99, 768)}


def test_scanned_trees_are_seen():
    assert look(SCANNED) == [("blocks", 0, 12)]
    assert look(MAXTEXT) == [("blocks", 1, 12)]
    assert look({"params": SCANNED["blocks"]}) == [("", 0, 12)]


def test_declared_stacks_are_not():
    assert not look(SCANNED, Layout(stacked="blocks"))
    assert not look(SCANNED, Layout(stacked={"blocks": None}))
    assert not look(MAXTEXT, Layout(stacked=lambda path, shape: 1 if "blocks" in path else None))
    box = {"w": nn.Partitioned(S(12, 7, 8), ("layers", None, None)), "s": S(12, 7)}
    assert not look(box)
    assert look({"w": S(12, 7, 8), "s": S(12, 7)})


@pytest.mark.parametrize(
    "params",
    [
        gpt2(2),
        {
            "conv": {"kernel": S(3, 3, 64, 64), "bias": S(64)},
            "bn": {"scale": S(64), "bias": S(64)},
            "last": {"kernel": S(3, 3, 64, 3), "bias": S(3)},
        },
        {
            "conv1": {"kernel": S(3, 16, 16), "bias": S(16)},
            "conv2": {"kernel": S(3, 3, 3, 3), "bias": S(3)},
        },
        {
            "attention": {
                **{n: {"kernel": S(768, 12, 64), "bias": S(12, 64)} for n in "qkv"},
                "out": {"kernel": S(12, 64, 768), "bias": S(768)},
            },
            "fc": dense(768, 3072),
        },
        {
            **{n: {"kernel": S(64, 8, 8), "bias": S(8, 8)} for n in "qkv"},
            "out": {"kernel": S(8, 8, 64), "bias": S(64)},
        },
        {"table": S(1000, 64), "positions": S(1, 1000, 64)},
        {n: {"kernel": S(64, 64), "bias": S(64)} for n in ("hi", "hf", "hg", "ho")},
    ],
    ids=["gpt2", "cnn", "convs", "attention", "square attention", "embeddings", "lstm"],
)
def test_other_networks_are_not_taken_for_scanned_ones(params):
    assert look(params) == []
