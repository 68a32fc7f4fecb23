"""Blocks are cut and pasted without loss, at a cost that grows with the shapes alone."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kradagrad_jax.engine.cut import cut, paste
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.plan import block_origins
from tests.engine.planning import MUON, plan_for


def filled(shapes, dtype=jnp.float32):
    """Arrays in which no two numbers are equal."""
    start = 0
    out = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out[name] = jnp.arange(start, start + size, dtype=dtype).reshape(shape)
        start += size
    return out


def check(params, layout):
    """Cuts and pastes; returns plan and stacks."""
    plan, leaves = plan_for(params, layout), jax.tree.leaves(params)
    stacks = cut(plan, leaves)
    assert set(stacks) == {bucket.key for bucket in plan.buckets}
    for bucket in plan.buckets:
        assert stacks[bucket.key].shape == (bucket.size, *bucket.shape)
        assert stacks[bucket.key].dtype == bucket.dtype
    back = paste(plan, stacks)
    covered = {i for entry in plan.covered for i in entry.indices}
    assert set(back) == covered
    assert covered | {row[0] for row in plan.uncovered} == set(range(len(leaves)))
    for i, x in back.items():
        assert x.shape == leaves[i].shape
        np.testing.assert_array_equal(x, leaves[i].astype(x.dtype))
    assert sum(x.size for x in stacks.values()) == sum(leaves[i].size for i in covered)
    return plan, stacks


SHAPES = {
    "w1": (7, 5), "w2": (7, 5), "k": (3, 2, 2, 5), "v": (9,), "scalar": (), "one": (1,),
    "row": (1, 6), "s1": (3, 4, 5), "s2": (3, 4, 5), "mid": (4, 3, 10), "qkv": (6, 12),
    "qkv2": (6, 12), "empty": (0, 3), "bias": (2, 6),
}  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([None, 1, 3, 4, 5, 256]),
        "merge": st.sampled_from(["matrix", "greedy", "none"]),
        "pieces": st.sampled_from(["even", "tail"]),
        "vectors": st.sampled_from(["diagonal", "block"]),
        "scalars": st.sampled_from(["diagonal", "block"]),
        "max_dim": st.sampled_from([None, 6, 8192]),
        "modes": st.sampled_from(
            [None, "shorter", "output", (False, True), {"w1|mid": "longer"}],
        ),
        "stacked": st.sampled_from(
            [None, "s[12]", {"s[12]": 0, "mid": -2}, {"s[12]": (0, 2), "mid": (1,), "w": 1}]
        ),
        "split": st.sampled_from(
            [None, {"qkv": {1: 3}}, {"qkv": {-1: (2, 7), 0: 2}}, {"qkv$": (1, (5,)), "mid": {2: 2}}]
        ),
        "include": st.sampled_from([None, "[a-z]1|k|mid|qkv"]),
        "joined": st.sampled_from([False, False, False, True]),
    }
)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(OPTIONS, st.permutations(list(SHAPES)))
def test_paste_undoes_cut(options, order):
    check(
        filled({f"{i:02}{name}": SHAPES[name] for i, name in enumerate(order)}), Layout(**options)
    )


@pytest.mark.parametrize(
    "layout",
    [
        Layout(block_size=3, stacked={"a": MUON((0, 2), 1), "b": MUON(1, 0), "c": None}),
        Layout(block_size=3, stacked={"a": MUON(0, (2,)), "b": MUON(), "c": MUON(0, ())},
               vectors="block"),
    ],
)  # fmt: skip
def test_paste_undoes_cut_of_matrices_named_by_axes(layout):
    check(filled({"a": (4, 5, 6), "b": (4, 7), "c": (4,)}), layout)


def test_half_precision_leaves_are_widened_and_stay_in_order():
    params = {"a": jnp.arange(12.0, dtype=jnp.bfloat16).reshape(3, 4), "b": jnp.ones((3, 4))}
    _, stacks = check(params, Layout())
    assert stacks["3x4"].dtype == jnp.float32


def test_blocks_lie_where_their_origins_say():
    shapes = {"a": (3, 5, 7), "b": (3, 5, 7), "c": (4, 9)}
    params = filled(shapes)
    layout = Layout(block_size=3, stacked="[ab]", split={"c": {1: (2,)}}, pieces="tail")
    plan, stacks = check(params, layout)
    leaves = jax.tree.leaves(params)
    for bucket in plan.buckets:
        for slot in bucket.slots:
            for row, origin in enumerate(block_origins(plan, slot), start=slot.offset):
                x = leaves[origin.index]
                x = x[origin.layer] if x.ndim == 3 else x[:, origin.part :]
                (i, j), (m, n) = origin.first, bucket.shape
                np.testing.assert_array_equal(stacks[bucket.key][row], x[i : i + m, j : j + n])


def blocks_of(params, layout):
    """Every block of a tree as bytes, counted."""
    _, stacks = check(params, layout)
    return collections.Counter(
        (key, np.asarray(x).tobytes()) for key, stack in stacks.items() for x in stack
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scanned_and_unrolled_trees_give_the_same_blocks(axis):
    layers = filled({f"h{i}/{n}": s for i in range(3) for n, s in (("w", (8, 6)), ("b", (6,)))})
    scanned = {
        n: jnp.stack([layers[f"h{i}/{n}"] for i in range(3)], axis if n == "w" else min(axis, 1))
        for n in ("w", "b")
    }
    options = {"block_size": 4, "vectors": "block"}
    stacked = {"w": axis, "b": min(axis, 1)}
    assert blocks_of(layers, Layout(**options)) == blocks_of(
        scanned, Layout(stacked=stacked, **options)
    )


def test_split_parameters_give_the_blocks_of_separate_ones():
    w = filled({"w": (10, 12)})["w"]
    layout = {"block_size": 4, "max_dim": 11}
    for parts in (3, (4, 8), (4, 6)):
        pieces = jnp.split(w, parts, axis=1)
        separate = {f"w{i}": x for i, x in enumerate(pieces)}
        assert blocks_of({"w": w}, Layout(split={"w": {1: parts}}, **layout)) == blocks_of(
            separate, Layout(**layout)
        )


def test_joined_is_the_ravelled_tree():
    params = filled({"a": (3, 4), "b": (), "c": (5,)})
    _, stacks = check(params, Layout(joined=True))
    (stack,) = stacks.values()
    np.testing.assert_array_equal(stack, np.arange(18.0)[None])


# ---- cost


def operations(function, *arguments):
    found: collections.Counter[str] = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for value in jax.tree.leaves(tuple(equation.params.values())):
                if hasattr(value, "jaxpr"):
                    count(value.jaxpr)

    count(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def network(layers):
    return {
        f"h{i:02}": {"up": jnp.ones((8, 12)), "down": jnp.ones((12, 8)), "s": jnp.ones((2, 8, 5))}
        for i in range(layers)
    }


LAYOUT = Layout(block_size=4, stacked="/s", split={"up": {1: (4, 9)}})


def test_operations_grow_with_shapes_and_not_with_leaves():
    few, many = (
        operations(lambda t, n=n: cut(plan_for(network(n), LAYOUT), jax.tree.leaves(t)), network(n))
        for n in (12, 48)
    )
    assert few["transpose"] == many["transpose"] > 0
    # what is left: one operation per leaf, which puts it into its stack
    assert sum(many.values()) - sum(few.values()) <= 36 * 3 + 4


def test_leaves_that_are_blocks_are_not_transposed():
    params = {f"h{i}": jnp.ones((8, 12)) for i in range(3)} | {"s": jnp.ones((5, 8, 12))}
    plan = plan_for(params, Layout(stacked="s"))
    found = operations(lambda t: paste(plan, cut(plan, jax.tree.leaves(t))), params)
    assert found["transpose"] == 0
    assert found["dynamic_slice"] == 3  # one per leaf that was put into a stack


def test_the_places_of_leaves_are_no_constants():
    """Kernels that differ in a constant would be compiled one by one."""

    def program(n):
        plan = plan_for(network(n), LAYOUT)
        stacks = jax.eval_shape(lambda t: cut(plan, jax.tree.leaves(t)), network(n))
        return lambda s: paste(plan, s), stacks

    few, many = (operations(*program(n)) for n in (3, 12))
    assert few["transpose"] == many["transpose"] > 0
    assert few["slice"] == many["slice"]
    function, stacks = program(3)
    assert " conditional(" in jax.jit(function).lower(stacks).compile().as_text()


def test_cut_and_paste_under_vmap():
    params = filled({"a": (8, 12), "b": (8, 12), "c": (5, 4)})
    plan = plan_for(params, Layout(block_size=4))
    many = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), jax.tree.leaves(params))
    back = jax.vmap(lambda leaves: paste(plan, cut(plan, leaves)))(many)
    for i, x in enumerate(many):
        np.testing.assert_array_equal(back[i], x)
