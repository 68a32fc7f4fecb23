"""The inverse-free family in single precision, against the same float64 recordings."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from tests.golden import singd, sirfshampoo

FAMILIES = {name: module for module in (singd, sirfshampoo) for name in module.METHODS}
DATA = Path(__file__).parent / "data"


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden-dir") or DATA
    raws = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    ours = {k: r for k, r in raws.items() if r.get("method") in FAMILIES and "grads" in r["inputs"]}
    metafunc.parametrize("raw", list(ours.values()), ids=list(ours))


@pytest.mark.slow
def test_float32(raw, request):
    """Every array within 1e-5 of the recorded one, relative to its largest entry."""
    errors = FAMILIES[raw["method"]].trajectory(raw, jnp.float32)
    for kind, error in errors.items():
        request.node.user_properties.append((kind, f"{error:.1e}"))
    assert max(errors.values()) <= 1e-5, errors
