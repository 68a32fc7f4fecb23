"""Whether a parameter that is added to the output of a layer is its bias."""

import numpy as np

from kradagrad_jax.curvature.uses import Use
from kradagrad_jax.curvature.views import Dims, View


def _indices(dims: Dims) -> np.ndarray:
    """Flat index of every element of a view."""
    out = np.zeros((), np.int64)
    for dim in dims:
        axis = np.zeros((), np.int64)
        for n, stride in dim:
            axis = axis[..., None] + np.arange(n) * stride
        out = out[..., None] + axis.reshape(-1)
    return out


def is_bias(bias: View, use: Use, image: View, shape: tuple[int, ...]) -> bool:
    """Whether the elements of ``bias`` lie on the outputs of ``use``, in order and completely."""
    if len(bias.dims) != len(image.dims) or bias.loops != use.view.loops:
        return False
    features = [i for i, dim in enumerate(bias.dims) if dim]
    if any(s == 0 for i in features for _, s in bias.dims[i]):
        features = [i for i in features if any(s for _, s in bias.dims[i])]
        if any(s == 0 for i in features for _, s in bias.dims[i]):
            return False
    sizes = [int(np.prod([n for n, _ in image.dims[i]])) for i in features]
    wanted = int(np.prod([shape[d] for d in use.out_dims]))
    if int(np.prod(sizes)) != wanted:
        return False
    at_bias = _indices(tuple(bias.dims[i] for i in features)).reshape(-1)
    place = np.unravel_index(_indices(tuple(image.dims[i] for i in features)).reshape(-1), shape)
    if any(np.any(place[d]) for d in range(len(shape)) if d not in use.out_dims):
        return False
    canonical = np.zeros(wanted, np.int64)
    for d in use.out_dims:
        canonical = canonical * shape[d] + place[d]
    return bool(np.array_equal(np.sort(canonical), np.arange(wanted))) and bool(
        np.array_equal(at_bias, canonical)
    )
