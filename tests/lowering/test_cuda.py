"""Programs compiled for an H100, without one; `make lowering` installs what it takes.

The description selects code paths; it was typed in from public figures, not read off a device.
"""

import importlib.util

import pytest

from tests.lowering import ahead, programs

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="jax-cuda12-plugin is not installed: make lowering",
    ),
    pytest.mark.slow,
    pytest.mark.xdist_group("cuda"),
]
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84978434048  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
EIGH, CHOLESKY, QR, SVD = (f"cusolver_{name}_ffi" for name in ("syevd", "potrf", "geqrf", "gesvdj"))
KERNELS = {
    **{name: {EIGH} for name in ("shampoo", "kradagrad_star", "kradagrad")},
    **{name: {CHOLESKY} for name in ("kfac", "tnt")},
    **{name: set() for name in programs.NO_ROOTS},
    "ginger": {SVD},
    "rs_kfac": {QR, SVD},
    "sre_kfac": {QR, EIGH},
    **{name: {QR, SVD, EIGH} for name in ahead.BRAND},
}


@pytest.fixture(scope="module")
def device():
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
    )
    return found.devices[0]


@pytest.mark.parametrize("program", ahead.PROGRAMS, ids=lambda program: program.name)
def test_every_method(program, device, record_property):
    text = ahead.compile_for(device, program, record_property, "H100")
    assert set(ahead.precisions(text)) == {"highest,highest"}
    assert ahead.calls(text) & {EIGH, CHOLESKY, QR, SVD} == KERNELS[program.alias]


@pytest.mark.parametrize("program", ahead.VARIANTS, ids=lambda program: program.name)
def test_variants(program, device, record_property):
    text = ahead.compile_for(device, program, record_property, "H100")
    assert set(ahead.precisions(text)) == {"highest,highest"}
