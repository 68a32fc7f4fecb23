"""Trajectories of other implementations, reproduced by the public transformations.

One test per JSON file, those of tests/golden/data or of `--golden-dir`: parameters after every
step, and statistics and preconditioners wherever the file records them. Semantics that no public
preset has (see quirks.py, official_roots.py, alternating.py, facebook.py and precondition.py) are
built around the public transformations by the tests alone.
"""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.golden import (
    brand,
    clean,
    facebook,
    ginger,
    kfac,
    kl,
    official,
    precondition,
    qng,
    singd,
    sirfshampoo,
    soap,
    tnt,
)
from tests.golden.case import Case
from tests.golden.recorded import Recorded, UnknownFile, load
from tests.x64 import x64

DATA = Path(__file__).parent / "data"
SOURCES = {  # a piece of the file's source -> builder
    "reference implementation": clean.build,
    "jonathanmei/kradagrad": official.build,
    "facebookresearch/optimizers": facebook.build,
    "google-research/precondition": precondition.build,
}


def pytest_generate_tests(metafunc):
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden-dir") or DATA
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise pytest.UsageError(f"no JSON files in {folder}")
    metafunc.parametrize("path", paths, ids=[p.stem for p in paths])


def build(file: Recorded, params: dict[str, jax.Array]) -> Case:
    for piece, builder in SOURCES.items():
        if piece in file.source:
            return builder(file, params)
    raise UnknownFile(f"{file.name}: unknown source {file.source!r}")


# Families whose statistics are not gradients: `errors_of(raw)`, `tolerance_of(raw)`.
FAMILIES = {
    name: module
    for module in (kfac, brand, tnt, ginger, qng, singd, sirfshampoo, soap, kl)
    for name in module.METHODS
}


def errors_of(file: Recorded) -> dict[str, float]:
    """Largest relative error of parameters, statistics and preconditioners over all steps."""
    with x64() if file.dtype == np.float64 else contextlib.nullcontext():
        params = {name: jax.numpy.asarray(value) for name, value in file.params.items()}
        case = build(file, params)
        update = jax.jit(case.tx.update) if case.jit else case.tx.update
        state = case.tx.init(params)
        worst = {"params": 0.0} | dict.fromkeys(file.factors, 0.0)
        for step, (grads, after) in enumerate(zip(file.grads, file.after, strict=True)):
            grads = {name: jax.numpy.asarray(value) for name, value in grads.items()}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for name, expected in after.items():
                worst["params"] = max(worst["params"], relative(params[name], expected))
            factors = case.factors(state, params)
            for kind, by_step in file.factors.items():
                for name, expected in by_step.get(step, {}).items():
                    ours = factors[name][kind] if expected else []
                    assert len(ours) == len(expected), f"{kind} of {name}: number of matrices"
                    pairs = zip(ours, expected, strict=True)
                    worst[kind] = max([worst[kind], *(relative(a, b) for a, b in pairs)])
    return worst


def relative(ours: jax.Array, expected: np.ndarray) -> float:
    ours = np.asarray(ours)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    difference = np.abs(ours - expected).max()
    return float(difference / np.abs(expected).max()) if difference else 0.0


def test_golden(path, request):
    """Every file matches at its own tolerance, relative to the largest entry of each array."""
    raw = json.loads(path.read_text())
    family = FAMILIES.get(raw.get("method"))
    try:
        if family is not None:
            errors, tolerance = family.errors_of(raw), family.tolerance_of(raw)
        else:
            file = load(path)
            errors, tolerance = errors_of(file), file.tolerance
    except UnknownFile as error:
        pytest.fail(f"{path.name}: {error}")
    for kind, error in errors.items():
        request.node.user_properties.append((kind, f"{error:.1e}"))
    assert max(errors.values()) <= tolerance, errors


def test_a_wrong_trajectory_is_noticed():
    """The comparison itself: one entry of one recorded array moved by ten tolerances."""
    file = load(DATA / "kradagradstar_clean_fro.json")
    for where in (file.after[3]["b"], file.factors["statistics"][5]["w"][1]):
        where.flat[2] += 10 * file.tolerance * np.abs(where).max()
        assert max(errors_of(file).values()) > file.tolerance
        where.flat[2] -= 10 * file.tolerance * np.abs(where).max()
    assert max(errors_of(file).values()) <= file.tolerance


@pytest.mark.parametrize("change", [{"method": "ginger"}, {"source": "somewhere"}, {"config": 1}])
def test_an_unknown_file_is_refused(tmp_path, change):
    """Methods, sources and configuration keys that nobody reads are errors, never passes."""
    raw = json.loads((DATA / "kradagradstar_clean_fro.json").read_text())
    if "config" in change:
        change = {"config": raw["config"] | {"surprise": 1}}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(raw | change))
    with pytest.raises(UnknownFile):
        errors_of(load(path))
