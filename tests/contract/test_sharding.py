"""Meshes with Explicit and with Auto axes, in processes that simulate four devices.

A process of their own keeps the devices, and XLA's thread pools for them, from all other tests.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_mesh(kind):
    environment = flags.simulating(4) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.mesh_script", kind],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
