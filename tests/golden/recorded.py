"""Golden files: trajectories recorded from other implementations, as numpy arrays."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("kradagrad", "kradagradstar", "shampoo")
FACTOR_NAMES = {"factor_matrices": "statistics", "inverse_roots": "preconditioners"}


class UnknownFile(Exception):
    """The file is of a method, source or configuration that no builder knows."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One golden file.

    Attributes:
      name: file name without suffix.
      method, source, config: as in the file.
      dtype: numpy dtype of the run.
      tolerance: largest allowed difference, relative to the largest entry of each array.
      params: initial parameters by name.
      grads: gradients by name, one dictionary per step.
      after: parameters by name after each step.
      factors: `{"statistics" | "preconditioners": {step: {name: flat list of matrices}}}`; flat
        lists are block-major, then by mode. Files record every step or the last one only.
    """

    name: str
    method: str
    source: str
    config: dict[str, Any]
    dtype: np.dtype
    tolerance: float
    params: dict[str, np.ndarray]
    grads: list[dict[str, np.ndarray]]
    after: list[dict[str, np.ndarray]]
    factors: dict[str, dict[int, dict[str, list[np.ndarray]]]]


def load(path: Path) -> Recorded:
    """Reads a file.

    Raises:
      UnknownFile: the method is not one of this suite.
    """
    raw = json.loads(path.read_text())
    method = raw.get("method")
    if method not in METHODS:
        raise UnknownFile(f"{path.name}: method {method!r} is not one of {METHODS}")
    dtype = np.dtype(raw["dtype"])
    outputs = raw["outputs"]
    steps = len(raw["inputs"]["grads"])
    factors = {}
    for key, value in outputs.items():
        if key != "params":
            first = steps - len(value)  # a shorter record holds the last steps
            factors[FACTOR_NAMES.get(key, key)] = {
                first + i: {n: _matrices(x, dtype) for n, x in row.items()}
                for i, row in enumerate(value)
            }
    return Recorded(
        name=path.stem,
        method=method,
        source=raw["source"],
        config=raw["config"],
        dtype=dtype,
        tolerance=float(raw["tolerance"].split()[0]),
        params=_arrays(raw["inputs"]["params"], dtype),
        grads=[_arrays(g, dtype) for g in raw["inputs"]["grads"]],
        after=[_arrays(p, dtype) for p in outputs["params"]],
        factors=factors,
    )


def _arrays(tree: dict[str, Any], dtype: np.dtype) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype) for name, value in tree.items()}


def _depth(x: Any) -> int:
    return 1 + _depth(x[0]) if isinstance(x, list) and x else int(isinstance(x, list))


def _first(x: Any) -> Any:
    """The first number, or the empty list, at the bottom of a nested list."""
    return _first(x[0]) if isinstance(x, list) and x else x


def _matrices(x: Any, dtype: np.dtype) -> list[np.ndarray]:
    """Flattens [block][mode] or an already flat list to a list of square matrices."""
    if not x or not np.asarray(_first(x)).size:
        return []
    if _depth(x) == 2:
        return [np.asarray(x, dtype)]
    return [m for part in x for m in _matrices(part, dtype)]
