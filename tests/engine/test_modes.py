"""Which modes have a factor: by size, by cost over the whole tree, and by what the layout says."""

import itertools

import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax.engine.layout import Layout
from kradagrad_jax.engine.parts import state_numbers
from tests.engine.planning import S, dense, entries, gpt2, keys, plan_for, reasons


def state_per_weight(plan, layout):
    state = sum(
        len(e.indices) * e.stack * state_numbers(e.merged, e.factored, layout) for e in plan.covered
    )
    return state / sum(len(e.indices) * np.prod(e.shape) for e in plan.covered)


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
    whole = Layout(max_dim=20, block_size=None)
    plan = plan_for({"w": S(30, 40), "body": S(3, 4)}, whole)
    assert reasons(plan) == {"w": "mode of 30 > max_dim, mode of 40 > max_dim"}
    # where modes can be cut, a matrix that is long on both sides is
    assert keys(plan_for({"w": S(30, 40)}, Layout(max_dim=20, block_size=10))) == {"10x10": 12}


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


def test_the_limit_keeps_the_last_of_equal_modes():
    assert plan_for({"w": S(600, 600)}, Layout(state_limit=2.0)).covered[0].factored == (
        False,
        True,
    )


def test_explicit_modes_are_not_touched_by_the_limit():
    params = {"a": S(4096, 8), "b": S(4096, 8)}
    plan = plan_for(params, Layout(modes={"a": (True, True)}))
    assert {p: e.factored for p, e in entries(plan).items()} == {
        "a": (True, True),
        "b": (False, True),
    }


def test_explicit_modes_are_counted_all_the_same():
    params = {"a": S(4096, 8), "b": S(4096, 8), "body": S(2048, 2048)}
    plan = plan_for(params, Layout(modes={"^a": (True, True)}, state_limit=4.3))
    assert entries(plan)["body"].factored == (False, True)  # b alone does not save enough


def _by_function(path, merged):
    return "input" if merged == (5, 7) else None


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
        (_by_function, (5, 7), (True, False)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
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


ALIASES = [kj.shampoo, kj.kradagrad_star, kj.kradagrad]


def treated(tx):
    params = {"w": S(6, 4), "wpe": S(5, 4)}
    return {row.paths[0]: row.treated for row in kj.describe(tx, params).rows}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_named_exponent_is_that_of_all_that_modes_says_nothing_of(alias):
    tx = alias(0.1, exponent="one_sided", layout=Layout(modes={"wpe": "input"}))
    assert treated(tx) == {"w": "(6)x4", "wpe": "5x(4)"}
    with pytest.raises(ValueError, match="pattern 'nowhere'"):
        treated(alias(0.1, exponent="one_sided", layout=Layout(modes={"nowhere": "input"})))


@pytest.mark.parametrize("alias", ALIASES)
def test_a_parameter_all_of_whose_exponents_are_zero_has_no_factor(alias):
    assert treated(alias(0.1, exponent={2: 0})) == {"w": "adam", "wpe": "adam"}
    tx = alias(0.1, exponent=(0, 0.5), layout=Layout(modes={"wpe": "input"}))
    assert treated(tx) == {"w": "(6)x4", "wpe": "adam"}
    with pytest.raises(ValueError, match="exponent=0"):
        alias(0.1, exponent=0)
