"""Sharded batches and ``jax.shard_map``, in a process of their own with 8 virtual devices."""

import subprocess
import sys
from pathlib import Path

from tests import flags

ROOT = Path(__file__).resolve().parents[2]


def test_eight_devices():
    environment = flags.simulating(8) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.curvature.devices_script"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["batch sharded", "shard_map around"]
