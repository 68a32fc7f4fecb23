"""A flax TrainState that passes curvature on to the optimizer; flax is imported when it is used."""

import functools
from collections.abc import Mapping
from typing import Any

import optax


def train_state_class(base: type | None = None) -> type:
    """Subclass of a flax ``TrainState`` whose ``apply_gradients`` takes extra arguments.

    flax's own ``apply_gradients`` hands keywords to ``replace`` and none to the optimizer.

    Args:
      base: a ``flax.training.train_state.TrainState`` or a subclass of it; default: the former.

    Returns:
      The class. ``state.apply_gradients(grads=grads, curvature=curvature)`` calls
      ``tx.update(grads, opt_state, params, curvature=curvature)``; further arguments of the
      optimizer go into ``update_args={...}``, other keywords replace fields as before.

    Raises:
      ImportError: flax is not installed.

    Examples:
      >>> from kradagrad_jax.curvature import train_state_class
      >>> TrainState = train_state_class()  # doctest: +SKIP
    """
    from flax.training.train_state import TrainState

    return _subclass(base or TrainState)


@functools.cache
def _subclass(base: Any) -> type:
    class CurvatureTrainState(base):
        """A TrainState that passes ``curvature`` and ``update_args`` to the optimizer."""

        def apply_gradients(
            self,
            *,
            grads: Any,
            curvature: Any = None,
            update_args: Mapping[str, Any] | None = None,
            **kwargs: Any,
        ) -> Any:
            tx = optax.with_extra_args_support(self.tx)
            more = {"curvature": curvature, **(update_args or {})}

            def update(updates: Any, state: Any, params: Any = None) -> Any:
                return tx.update(updates, state, params, **more)

            bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
            after = base.apply_gradients(bound, grads=grads, **kwargs)
            return after.replace(tx=self.tx)

    return CurvatureTrainState
