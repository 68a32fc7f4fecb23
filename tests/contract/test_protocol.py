"""The calling conventions of optax: pairs of factories, signatures, extra arguments, purity."""

import doctest
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests import layer_registry
from tests.registry import (
    ENTRIES,
    assert_close,
    assert_equal,
    compiled,
    grads_at,
    over_aliases,
    over_entries,
    params_like,
)

PAIRS = [(name, getattr(kj, name)) for name in dir(kj) if name.startswith("scale_by_")]
ENGINES = ("scale_by_blocks", "scale_by_layers")
METHODS = [pair for pair in PAIRS if pair[0] not in ENGINES]


@over_aliases
def test_the_alias_is_the_twin_times_minus_the_learning_rate(entry):
    params = params_like()
    grads = grads_at(params, 0)
    _, init, update = compiled(entry.name)
    whole, _ = update(grads, init(params), params)
    twin = entry.twin()
    direction, _ = jax.jit(twin.update)(grads, twin.init(params), params)
    assert_close(whole, jax.tree.map(lambda u: -entry.learning_rate * u, direction))


@over_aliases
def test_momentum_decay_and_mask_are_those_of_the_chain(entry):
    params = params_like()
    mask = {"b": False, "w": True, "x": True}
    options = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "weight_decay_mask": mask}
    whole = entry.make(0.1, **options)
    chain = optax.chain(
        entry.twin(),
        optax.trace(0.8, nesterov=True),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(0.1),
    )
    states = whole.init(params), chain.init(params)
    both = jax.jit(
        lambda g, s, p: [tx.update(g, x, p) for tx, x in zip((whole, chain), s, strict=True)]
    )
    for t in range(3):
        (ours, a), (theirs, b) = both(grads_at(params, t), states, params)
        states = a, b
        assert_equal(ours, theirs)


@over_entries
def test_types_of_the_factories(entry):
    for tx in (entry.make(), entry.twin()):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        assert isinstance(tx, optax.GradientTransformation)
        assert optax.with_extra_args_support(tx) is tx


def test_every_transformation_has_an_alias_and_is_in_the_registry():
    names = {entry.alias.__name__ for entry in (*ENTRIES, *layer_registry.ENTRIES)}
    for name, _ in METHODS:
        assert callable(getattr(kj, name.removeprefix("scale_by_")))
        assert name.removeprefix("scale_by_") in names


@pytest.mark.parametrize(("name", "scale_by"), METHODS, ids=lambda x: x if str(x) == x else "")
def test_signatures(name, scale_by):
    """All of the twin's arguments, keyword-only but for `spec`, and the learning rate in front."""
    alias = getattr(kj, name.removeprefix("scale_by_"))
    outer = inspect.signature(alias).parameters
    inner = inspect.signature(scale_by).parameters
    assert next(iter(outer)) == "learning_rate"
    assert set(inner) <= set(outer)
    assert set(outer) - set(inner) - {"learning_rate"} == {
        "momentum",
        "nesterov",
        "weight_decay",
        "weight_decay_mask",
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    positional = {"learning_rate"} | ({"spec"} if next(iter(inner)) == "spec" else set())
    assert all(p.kind is keyword for n, p in outer.items() if n not in positional)
    assert all(p.kind is keyword for n, p in inner.items() if n not in positional)
    given = (layer_registry.spec(),) if "spec" in positional else ()
    with pytest.raises(TypeError, match="momentun"):
        alias(0.1, *given, momentun=0.9)


@pytest.mark.lenient_promotion
@pytest.mark.parametrize("name", [p for pair in METHODS for p in (pair[0], pair[0][9:])])
def test_docstrings(name):
    """optax's order of sections, every argument named, examples that run."""
    factory = getattr(kj, name)
    doc = inspect.getdoc(factory)
    twin = name.startswith("scale_by_")
    layers = "spec" in inspect.signature(factory).parameters
    sections = ["Args:", "Returns:", "Raises:"] + ["Examples:"] * (not (twin and layers))
    places = [doc.index(section) for section in sections]
    assert places == sorted(places)
    if name.startswith("scale_by_"):
        assert "arxiv.org/abs/" in doc.lower()
        args = doc[places[0] : places[1]]
        for argument in inspect.signature(factory).parameters:
            assert re.search(rf"\b{argument}\b", args) or "**options: as in" in args, argument
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(recurse=False).find(factory, name, globs={}):
        assert test.examples or "Examples:" not in sections
        assert runner.run(test).failed == 0


@over_aliases
def test_extra_arguments_and_params_may_be_given_in_any_way(entry):
    params = params_like()
    grads = grads_at(params, 0)
    _, init, update = compiled(entry.name)
    state = init(params)
    plain, _ = update(grads, state, params)
    named, _ = update(grads, state, params=params, unexpected_extra_args_nobody_expects=1)
    assert_equal(named, plain)


@over_entries
def test_params_are_needed_for_decay_only(entry):
    grads = params_like()
    tx = entry.make()
    state = tx.init(grads)
    if "weight_decay" in entry.outer:
        with pytest.raises(ValueError, match="params"):
            tx.update(grads, state)
    else:
        abstract = jax.eval_shape(tx.update, grads, state)
        assert jax.tree.structure(abstract[0]) == jax.tree.structure(grads)


@over_aliases
def test_params_none_changes_nothing(entry):
    params = params_like()
    grads = grads_at(params, 0)
    _, init, update = compiled(entry.name)
    state = init(params)
    assert_equal(update(grads, state, None), update(grads, state, params))


@over_entries
def test_pure_and_silent(entry, capfd):
    """Equal inputs give equal bits; inputs stay as they were; nothing is printed."""
    params = params_like()
    grads = grads_at(params, 0)
    _, init, update = compiled(entry.name)
    state = init(params)
    kept = jax.tree.map(np.array, (grads, state, params))
    first = update(grads, state, params)
    assert_equal(update(grads, state, params), first)
    assert_equal(jax.tree.map(np.asarray, (grads, state, params)), kept)
    assert_equal(init(params), state)
    assert capfd.readouterr() == ("", "")


@over_aliases
def test_zero_decay_leaves_no_trace(entry):
    params = params_like()
    off = entry.make(weight_decay=0.0, momentum=None)
    assert_equal(off.init(params), entry.make().init(params))
    assert jax.eval_shape(off.update, params, off.init(params)) is not None


MISUSE = [
    (lambda: kj.shampoo(0.1, preset="pape"), "preset.*paper"),
    (lambda: kj.shampoo(0.1, damping_rule="ridge"), "damping_rule.*relative"),
    (lambda: kj.shampoo(0.1, statistics="square_root", root="eigh"), "root.*svd"),
    (lambda: kj.shampoo(0.1, graft="adan"), "graft.*adam"),
    (lambda: kj.shampoo(0.1, root="svdd"), "root.*newton"),
    (lambda: kj.kradagrad_star(0.1, form="exact", damping=0.1), "damping.*direct"),
    (lambda: kj.kradagrad_star(0.1, form="exact", root="newton"), "root.*singular value"),
    (lambda: kj.kradagrad_star(0.1, bound="nuclear"), "bound.*sym"),
    (lambda: kj.kradagrad_star(0.1, initial_scale="relative"), "initial_scale.*gradient"),
    (lambda: kj.kradagrad(0.1, form="delayed"), "form.*direct"),
    (lambda: kj.Layout(merge="all"), "merge.*matrix"),
    (lambda: kj.Layout(block_size=0), "block_size.*positive"),
    (lambda: kj.Graft("sgd", per="row"), "per.*block"),
    (lambda: kj.SquareRoot(fold_every=0), "fold_every.*1"),
    (lambda: kj.Timing(ramp=-1), "ramp.*0"),
    (lambda: kj.shampoo(0.1, timing=kj.Timing(stagger=True), refresh_every=lambda t: 3), "stagger"),
    (lambda: _update(refresh_every=0), "interval"),
]


def _update(**options):
    tx = kj.shampoo(0.1, **options)
    params = params_like()
    jax.eval_shape(tx.update, params, tx.init(params))


@pytest.mark.parametrize(("misuse", "message"), MISUSE)
def test_misuse_names_the_argument_and_the_choices(misuse, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        misuse()


@over_aliases
def test_another_tree_than_at_init_is_refused_by_name(entry):
    """Raised while tracing, with the path of a parameter."""
    tx = entry.make()
    state = tx.init({"layer": {"kernel": jnp.ones((4, 3))}})
    grads = {"layer": {"kernel": jnp.ones((5, 3))}}
    with pytest.raises(ValueError, match="layer/kernel"):
        jax.eval_shape(tx.update, grads, state)
    with pytest.raises(ValueError, match="init"):
        jax.eval_shape(tx.update, {"a": jnp.ones((4, 3)), "b": jnp.ones(2)}, state)
