"""Sharded updates on meshes of eight simulated devices, each group in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import flags
from tests.sharding import nets

ROOT = Path(__file__).resolve().parents[2]
GROUPS = [
    nets.ALIASES[:3],
    ["soap", "kl_shampoo", "kl_soap", "sirfshampoo"],
    ["tnt", "ginger", "kfac"],
    ["rs_kfac", "sre_kfac", "b_kfac"],
    ["br_kfac", "bc_kfac", "brc_kfac"],
    ["ikfac", "ingd", "singd"],
]


def run(*arguments, timeout=900):
    # Simulated devices wait for each other in threads of XLA's pool: with a thread per core and
    # several collectives at a time nobody may be left to come.
    environment = flags.simulating(8) | {"PYTHONPATH": str(ROOT), "NPROC": "32"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_twenty_steps_float64(names):
    run("tests.sharding.mesh_script", "float64", *names)


@pytest.mark.slow
@pytest.mark.parametrize("names", [nets.ALIASES[:8], nets.ALIASES[8:]], ids=["first", "second"])
def test_twenty_steps_float32(names):
    run("tests.sharding.mesh_script", "float32", *names)


@pytest.mark.slow
def test_explicit_axes():
    run("tests.sharding.explicit_script")


def test_groups_are_all_aliases():
    assert sorted(name for names in GROUPS for name in names) == sorted(nets.ALIASES)
