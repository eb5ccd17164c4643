"""The user's own networks: `file.py:factory` or `package.module:factory`.

A factory is called with the keywords of --model-arg, and with `num_classes` if it has such a parameter.
"""

import inspect

from torch import nn

from r2cli.errors import InputError
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.own_code import factory as factory
from r2cli.storage.own_code import label as label


def build(spec: ModelSpec) -> nn.Module:
    """Call the factory. Raises InputError if it raises, wants other arguments, or returns no module."""
    assert spec.factory is not None
    keywords = dict(spec.args)
    try:
        signature = inspect.signature(spec.factory)
    except (TypeError, ValueError):  # a factory written in C may have no signature
        signature = None
    if signature is not None:
        if "num_classes" in signature.parameters and spec.classes:
            keywords.setdefault("num_classes", spec.classes)
        try:
            signature.bind(**keywords)
        except TypeError as error:
            raise InputError(f"{spec.name}{signature}: {error}: give --model-arg NAME=VALUE for each") from error
    # SystemExit too: a script that is not meant to be imported may call sys.exit.
    try:
        model = spec.factory(**keywords)
    except (Exception, SystemExit) as error:
        raise InputError(f"{spec.name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{spec.name} returned an object of type {type(model).__name__}: it must return a torch.nn.Module"
        )
    return model
