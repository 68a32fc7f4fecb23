"""The Flax models of the tasks. Their parameters are plain dicts of arrays."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      widths: outputs of every layer, the last one without ReLU.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, inputs)`` to ``(n, widths[-1])``."""
        for i, width in enumerate(self.widths):
            x = nn.Dense(width)(x if i == 0 else nn.relu(x))
        return x


class Autoencoder(nn.Module):
    """Encoder and its mirror image, ReLU, linear code, logits of the pixels.

    Attributes:
      widths: pixels first, code last, e.g. ``(64, 128, 64, 32, 16)``.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(n, pixels)`` to ``(n, pixels)``."""
        code = MLP(tuple(self.widths[1:]), name="encoder")(x)
        return MLP(tuple(reversed(self.widths[:-1])), name="decoder")(code)
