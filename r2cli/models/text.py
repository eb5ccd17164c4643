"""transformers' sequence classifiers, as `text:DIR` or `text:HUB/NAME`; `mobilebert` is Google's on the hub.

A network takes one int64 tensor (n, 3, length) of tokens: ids, attention mask, types. A checkpoint holds the
architecture's configuration and never the name of code: transformers' own classes are built from it, and nothing else.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import is_safe, require_safe

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMED = {"mobilebert": "google/mobilebert-uncased"}
# Of a configuration: where it came from, what names code or kernels, and what the data says.
LEFT_OUT = (
    *("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("attn_implementation", "experts_implementation", "id2label", "label2id", "num_labels", "problem_type"),
)


def has(name: str) -> bool:
    return name in NAMED or name.startswith("text:")


class _Stacked(nn.Module):
    """A classifier of transformers' that takes its inputs as one tensor (n, 3, length), and gives logits (n, classes).

    It is mixed into the network's own class, so that tensors keep the names that transformers gives them.
    """

    config: Any

    def forward(self, tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens[:, 0], "attention_mask": tokens[:, 1]}
        if (getattr(self.config, "type_vocab_size", None) or 0) > 1:
            given["token_type_ids"] = tokens[:, 2]
        logits = super().forward(**given).logits
        assert isinstance(logits, Tensor)
        return logits


def architecture(name: str, args: Mapping[str, Any], size: int) -> tuple[str, dict[str, Any]]:
    """What a checkpoint records of `name` for texts of `size` tokens: its family, and its configuration with `args` in
    the place of its own.

    Raises InputError where it cannot be had, or has no such classifier.
    """
    with _library(name) as transformers:
        config = transformers.AutoConfig.from_pretrained(_where(name), trust_remote_code=False)
    whole = config.to_dict()
    for key in args:
        if key not in whole:
            raise InputError(f"{name} has no '{key}' in its configuration: see its config.json for --model-arg")
    most = whole.get("max_position_embeddings")
    if most is not None and size > most:
        raise InputError(f"{name} reads at most {most} tokens: give a --size up to that")
    family = f"text:{config.model_type}"
    usual = type(config)().to_dict()
    known = _plain({"model_type": config.model_type, **config.to_diff_dict()})
    # What others keep beside the configuration describes no network.
    known = {key: value for key, value in known.items() if key in usual or is_safe(family, key, value)} | dict(args)
    require_safe(family, known, name)
    return family, known


def build(spec: ModelSpec) -> nn.Module:
    """The network of a recorded configuration, with fresh weights. Raises InputError where transformers cannot."""
    require_safe(spec.name, spec.args, "the network's description")
    with _library(spec.name) as transformers:
        config = dict(spec.args)
        family = str(config.pop("model_type", "nothing"))
        made = transformers.AutoConfig.for_model(family, **config, num_labels=spec.classes)
        model = transformers.AutoModelForSequenceClassification.from_config(made, trust_remote_code=False)
    assert isinstance(model, nn.Module)
    own = type(model)
    model.__class__ = type(own.__name__, (_Stacked, own), {})
    return model


def start(model: nn.Module, name: str) -> list[str]:
    """Give `model` the pre-trained weights of `name`, in place; returns the tensors that it has none for.

    Raises InputError where there are none, or they do not fit.
    """
    with _library(name) as transformers:
        found, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            _where(name), config=model.config, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
    model.load_state_dict(found.state_dict())
    return sorted(told["missing_keys"])


def write_tiny(folder: Path, words: Iterable[str]) -> None:
    """A MobileBERT of noise, two layers of 16, and a tokenizer of `words`, as transformers keeps them: for trials."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    narrow = dict.fromkeys(("embedding_size", "intra_bottleneck_size", "true_hidden_size"), 16)
    few = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_feedforward_networks"), 2)
    wide = {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 128}
    with _library("a trial's network") as transformers:
        config = transformers.MobileBertConfig(**narrow, **few, **wide, vocab_size=len(vocabulary))
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")


def tokenizer(name: str) -> str:
    """The tokenizer.json of `name`, with its padding. Raises InputError where it has none of that form."""
    with _library(name) as transformers:
        found = transformers.AutoTokenizer.from_pretrained(_where(name), trust_remote_code=False)
    own = getattr(found, "backend_tokenizer", None)
    if own is None or found.pad_token is None:
        raise InputError(f"the tokenizer of {name} has no tokenizer.json with a padding token: give one that has")
    own.enable_padding(pad_id=found.pad_token_id, pad_token=found.pad_token)
    return str(own.to_str())


def _where(name: str) -> str:
    return NAMED.get(name) or name.removeprefix("text:")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what does not belong into a file, or must not come out of one."""
    return {key: value for key, value in config.items() if key not in LEFT_OUT and not key.startswith("_")}


@contextmanager
def _library(name: str) -> "Iterator[Any]":
    """transformers, without its bars and warnings. Raises InputError for what it raises, and where it is not there."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"{name} needs transformers, which is not installed: pip install 'r2cli[text]'")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:  # files, the hub, and configurations each have errors of their own
        told = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name} cannot be had from transformers ({told}): give --model text:DIR or a hub's name"
        ) from error
