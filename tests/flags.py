"""Quick compilation, on which most tests would otherwise spend their time.

Their programs run a few times only. Without XLA's fusion emitters and LLVM's optimisations XLA
takes less than half of the time; `QUICK=0 make test` tests the programs that users get. Tests
that start what a user would start (notebooks, pages, an installed wheel, the search for a
deadlock) always do so with the default flags.
"""

import importlib.metadata
import os

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_SETTINGS = {"XLA_FLAGS": FLAGS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def compile_quickly() -> None:
    """Before jax is imported. A process with a flag that its jaxlib does not know would abort."""
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    if known and os.environ.get("QUICK") != "0":
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)


def simulating(devices: int) -> dict[str, str]:
    """Environment of a child process for which the CPU is so many devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def default_environment() -> dict[str, str]:
    """Environment of a child process that compiles as a user's would."""
    return {k: v for k, v in os.environ.items() if k not in _SETTINGS}
