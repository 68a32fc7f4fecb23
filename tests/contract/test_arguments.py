"""Arguments of all transformations: refused where they are wrong, documented with their values."""

import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax.transforms.arguments import declaration_of
from tests import layer_registry

METHODS = [
    name
    for name in dir(kj)
    if name.startswith("scale_by_") and name[9:] not in ("blocks", "layers")
]
WRONG = {
    "damping": (-1e-3, float("nan"), "1e-3"),
    "root_damping": (-1.0,),
    "beta1": (1, -0.1),
    "beta2": (1.5, -0.1),
    "ema": (1.1,),
    "lr_cov": (-0.1, 1.0),
    "riemannian_momentum": (1.0,),
    "refresh_every": (0, 2.5, "often"),
    "statistics_every": (-1, 1.5),
    "clip": (0,),
    "rank": (0, 1.5, jnp.asarray(2)),
    "approx": ("expanded",),
    "fisher": ("true",),
}


def make(name, **options):
    """The transformation with all that it needs."""
    wanted = inspect.signature(getattr(kj, name)).parameters
    first = (layer_registry.spec(),) if next(iter(wanted)) == "spec" else ()
    return getattr(kj, name)(*first, **options)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_outside_of_their_range_and_unknown_choices_are_refused(name):
    arguments = [a for a in inspect.signature(getattr(kj, name)).parameters if a in WRONG]
    assert "refresh_every" in arguments or "statistics_every" in arguments
    for argument in arguments:
        for value in WRONG[argument]:
            with pytest.raises(ValueError, match=f"^{argument} must be"):
                make(name, **{argument: value})


def test_the_ends_of_ranges_are_in_them():
    assert kj.shampoo(0.1, beta1=0, beta2=1.0, damping=0.0, refresh_every=1)
    assert kj.kradagrad_star(0.1, beta2=1)
    with pytest.raises(ValueError, match="beta2 must be above 0"):
        kj.kradagrad_star(0.1, beta2=0)


@pytest.mark.parametrize("value", [jnp.asarray(-1.0), lambda count: -1.0])
def test_what_is_known_later_is_not_looked_into(value):
    assert make("scale_by_kfac", damping=value)


def test_traced_values_pass():
    """`inject_hyperparams` hands over arrays, also of an argument with a range."""
    params = {"w": jnp.ones((4, 3))}
    tx = optax.inject_hyperparams(kj.shampoo)(0.1, damping=1e-4, refresh_every=2)
    jax.eval_shape(tx.update, params, tx.init(params))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kj.shampoo(0.1, momentun=0.9),
            r"^shampoo\(\).*'momentun'; did you mean 'momentum'",
        ),
        (
            lambda: kj.scale_by_tnt(dampin=1.0),
            r"^scale_by_tnt\(\).*'dampin'; did you mean 'damping'",
        ),
        (lambda: kj.tnt_rates({}, 0.1, groupin="none"), r"^tnt_rates\(\).*mean 'grouping'"),
        (lambda: kj.scale_by_ingd(None, structures="dense"), r"^scale_by_ingd\(\).*'structures'"),
        (lambda: kj.ikfac(0.1, None, riemannian_momentum=0.5), r"^ikfac\(\).*riemannian"),
        (lambda: kj.kfac(0.1), r"^kfac\(\).*'spec'"),
        (lambda: kj.kfac(0.1, None, spec=None), r"^kfac\(\).*'spec'"),
        (lambda: kj.shampoo(0.1, None), r"^shampoo\(\).*positional"),
    ],
)
def test_calls_that_do_not_fit_name_the_function_and_the_nearest_argument(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_state_what_the_presets_say(name):
    function = getattr(kj, name)
    declaration, doc = declaration_of(function), inspect.getdoc(function)
    entries = re.split(r"^  (?=\w+:)", doc[doc.index("Args:") : doc.index("Returns:")], flags=re.M)
    texts = {entry.split(":")[0]: " ".join(entry.split()) for entry in entries[1:]}
    assert list(texts) == list(inspect.signature(function).parameters)
    for preset, values in declaration.presets.items():
        for argument, value in values.items():
            if argument in texts and isinstance(value, (int, float, str)):
                assert f"``{value!r}``" in texts[argument], (argument, preset)


def test_structures_tell_states_of_sirfshampoo_apart():
    """Both triangles are packed in arrays of one shape."""
    params = {"w": jnp.ones((4, 3))}
    lower, upper, again = (
        kj.sirfshampoo(0.1, batch_size=4, structures=name) for name in ("tril", "triu", "tril")
    )
    state = lower.init(params)
    assert jax.tree.structure(again.init(params)) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="tril"):
        upper.update(params, state, params)


def test_signatures_do_not_need_docstrings():
    """Programs run with `python -OO` have none."""
    code = (
        "import inspect, kradagrad_jax as kj; "
        f"print([sorted(inspect.signature(getattr(kj, n)).parameters) for n in {METHODS}])"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours = [sorted(inspect.signature(getattr(kj, name)).parameters) for name in METHODS]
    assert done.stdout.strip() == str(ours)
