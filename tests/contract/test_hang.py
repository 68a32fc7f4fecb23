"""Batched LAPACK calls lock up on two cores in jaxlib 0.10: nothing of ours may.

Every algorithm, matrices of two shapes, a refresh at every step, 30 steps, XLA's default flags, in
a process that is stopped when it does not come back.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags
from tests.registry import CORE_NAMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import jax
from tests.registry import ENTRIES, grads_at, params_like

names = sys.argv[1:]
params = params_like({f"w{i}": (24 + 8 * (i % 2), 24) for i in range(6)})
for entry in ENTRIES:
    if entry.name not in names:
        continue
    stagger = "timing" in entry.options
    tx = entry.make(**({} if stagger else {"refresh_every": 1}))
    update, state = jax.jit(tx.update), tx.init(params)
    for t in range(30):
        updates, state = update(grads_at(params, t), state, params)
    jax.block_until_ready((updates, state))
    print(entry.name, flush=True)
"""


@pytest.mark.slow
def test_thirty_steps_come_back():
    dropped = ("NPROC", "OMP_NUM_THREADS")
    environment = {k: v for k, v in flags.default_environment().items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *CORE_NAMES],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == sorted(CORE_NAMES)
