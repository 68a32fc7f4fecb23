"""Settings and options of all tests; read before jax is imported."""

import os
import sys
from pathlib import Path

# One thread per LAPACK call: on a busy small machine more threads are many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `tests.*` and a checkout that is not installed
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        metavar="DIR",
        type=Path,
        help="run every JSON file of DIR as a golden test, in place of tests/golden/data",
    )
    parser.addoption(
        "--typecheck",
        action="store_true",
        help="check the annotations of kradagrad_jax while the tests run (jaxtyping, beartype)",
    )


def pytest_configure(config):
    if config.getoption("dist", "no") == "load":  # pytest -n: keeps groups (registry.py) together
        config.option.dist = "loadgroup"
    if config.getoption("--typecheck"):
        import jaxtyping

        config.kradagrad_hook = jaxtyping.install_import_hook("kradagrad_jax", "beartype.beartype")
