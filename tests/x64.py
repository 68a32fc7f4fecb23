"""Double precision for one test, under jax 0.7 and later."""

from contextlib import AbstractContextManager

import jax


def x64() -> AbstractContextManager:
    """Context in which arrays may be float64; make and use them inside it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()
