"""Settings and options of all tests; read before jax is imported."""

import os
import sys
from pathlib import Path

# One thread per LAPACK call: on a busy small machine more threads are many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
# Many tests compile the same program: workers and child processes find it on disk.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if str(ROOT) not in sys.path:  # `tests.*` and a checkout that is not installed
    sys.path.insert(0, str(ROOT))

from tests import flags  # noqa: E402

flags.compile_quickly()
# The inner floors, where annotations are the contract. The public face has messages of its own for
# arguments of a wrong type, and tests of them.
CHECKED = [
    *(f"kradagrad_jax.linalg.{name}" for name in ("arrays", "branches", "lapack", "newton")),
    *(f"kradagrad_jax.linalg.{name}" for name in ("products", "tracking")),
    *(f"kradagrad_jax.factors.{name}" for name in ("exponents", "gram", "krad", "kradagrad")),
    *(
        f"kradagrad_jax.factors.{name}"
        for name in ("kfac", "kron", "lowrank", "moving", "roots", "singd", "sirfshampoo", "tnt")
    ),
    *(f"kradagrad_jax.engine.{name}" for name in ("cut", "layers", "packing", "report")),
    *(
        f"kradagrad_jax.engine.{name}"
        for name in ("apply", "fold", "refresh", "step", "timing", "trees")
    ),
]


MEMORY = 2.5e9  # bytes of one process beyond which jax's caches of compiled programs are dropped
PAUSE = 100  # tests between two such purges
_tests_since = [0]


def pytest_collection_modifyitems(items):
    """The longest first, so that at the end no worker waits for another."""
    items.sort(key=lambda item: "tests/sharding/" not in item.nodeid)


def pytest_runtest_teardown(nextitem):
    """Thousands of compiled programs would fill the memory of a small machine."""
    statm = Path("/proc/self/statm")
    _tests_since[0] += 1
    if nextitem is None or _tests_since[0] < PAUSE or not statm.exists():
        return
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MEMORY:
        import gc

        import jax

        _tests_since[0] = 0
        jax.clear_caches()
        gc.collect()


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
    if config.getoption("--typecheck"):
        import jaxtyping

        config.kradagrad_hook = jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
