"""Restores states that another process has saved and goes on: aliases, folder, steps, as given."""

import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.scale import zoo


def main(folder: Path, start: int, stop: int, names: list[str]) -> None:
    for name in names:
        case = next(c for c in zoo.CASES if c.name == name)
        target = jax.eval_shape(lambda c=case: (zoo.params(), c.tx.init(zoo.params())))
        with ocp.StandardCheckpointer() as checkpointer:
            p, state = checkpointer.restore(folder / name, target)
        leaves = jax.tree.leaves(case.train(p, state, range(start, stop)))
        (folder / f"{name}.pickle").write_bytes(pickle.dumps([np.asarray(x) for x in leaves]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
