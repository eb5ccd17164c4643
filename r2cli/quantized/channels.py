"""Numbers per channel, in a shape that broadcasts against the values of the channels."""

from torch import Tensor


def per_channel(parameter: Tensor, ndim: int, axis: int | None = 0) -> Tensor:
    """Return `parameter` (channels,) as (1, .., channels, .., 1), with `ndim` axes and the channels along `axis`.

    So it broadcasts against a tensor of `ndim` axes. Without an axis it is one number () for all channels, which
    broadcasts as it is.
    """
    if axis is None:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)
