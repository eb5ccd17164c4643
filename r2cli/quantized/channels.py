"""Numbers that belong to channels, in a shape that goes with the values of those channels."""

from torch import Tensor


def per_channel(parameter: Tensor, ndim: int, axis: int | None = 0) -> Tensor:
    """`parameter` (channels,) as (1, .., channels, .., 1): `ndim` axes, the channels along `axis`.

    It then broadcasts against a tensor of `ndim` axes. Without an axis there is one number () for all channels, which
    broadcasts as it is.
    """
    if axis is None:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)
