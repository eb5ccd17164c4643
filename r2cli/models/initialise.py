"""He et al., "Delving Deep into Rectifiers" (2015): the initialisation of the networks that are ours."""

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Convolutions N(0, 2 / fan-out), linear layers N(0, 0.01), biases 0; in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
