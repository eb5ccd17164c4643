"""The sequence classifiers of transformers: `text:DIR`, `text:HUB/NAME`, or `mobilebert`, which is Google's on the hub.

A network takes one int64 tensor of tokens (n, 3, length): ids, attention mask, types. A checkpoint holds the
configuration of the architecture, and never the name of code: only transformers' own classes are built from it.
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
# Keys of a configuration that are not kept: they say where it came from, name code or kernels, or depend on the data.
LEFT_OUT = (
    *("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config"),
    *("attn_implementation", "experts_implementation", "id2label", "label2id", "num_labels", "problem_type"),
)


def has(name: str) -> bool:
    """Say whether `name` is a network for text."""
    return name in NAMED or name.startswith("text:")


class _Stacked(nn.Module):
    """A classifier that takes its inputs as one tensor (n, 3, length), and returns logits (n, classes).

    `build` mixes it into the network's own class. A module around the network would put a prefix on every name in its
    state_dict.
    """

    config: Any

    def forward(self, tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens[:, 0], "attention_mask": tokens[:, 1]}
        if (getattr(self.config, "type_vocab_size", None) or 0) > 1:  # RoBERTa and others have no token types
            given["token_type_ids"] = tokens[:, 2]
        logits = super().forward(**given).logits
        assert isinstance(logits, Tensor)
        return logits


def architecture(name: str, args: Mapping[str, Any], size: int) -> tuple[str, dict[str, Any]]:
    """Return what a checkpoint records of the network `name`: its family, and its configuration, in which `args` win.

    Raises InputError where transformers cannot load the configuration, for an unknown key in `args`, and where the
    network cannot read texts of `size` tokens.
    """
    with _library(name) as transformers:
        config = transformers.AutoConfig.from_pretrained(_where(name), trust_remote_code=False)
    complete = config.to_dict()
    for key in args:
        if key not in complete:
            raise InputError(f"{name} has no '{key}' in its configuration: see its config.json for --model-arg")
    most = complete.get("max_position_embeddings")
    if most is not None and size > most:
        raise InputError(f"{name} reads at most {most} tokens: give a --size of at most {most}")
    family = f"text:{config.model_type}"
    defaults = type(config)().to_dict()
    recorded = _plain({"model_type": config.model_type, **config.to_diff_dict()})
    # Other programs keep keys of their own in a config.json, which describe no network: those that are unsafe are left
    # out. An unsafe value of a key that transformers knows is refused.
    recorded = {k: value for k, value in recorded.items() if k in defaults or is_safe(family, k, value)} | dict(args)
    require_safe(family, recorded, name)
    return family, recorded


def build(spec: ModelSpec) -> nn.Module:
    """Build the network of a recorded configuration, with new random weights.

    Raises InputError for a configuration that transformers cannot build, or that could load something.
    """
    require_safe(spec.name, spec.args, "the network's description")
    with _library(spec.name) as transformers:
        config = dict(spec.args)
        family = str(config.pop("model_type", "nothing"))
        complete = transformers.AutoConfig.for_model(family, **config, num_labels=spec.classes)
        model = transformers.AutoModelForSequenceClassification.from_config(complete, trust_remote_code=False)
    assert isinstance(model, nn.Module)
    own = type(model)
    model.__class__ = type(own.__name__, (_Stacked, own), {})
    return model


def limits(spec: ModelSpec) -> tuple[int, int]:
    """How many tokens, and how many types of tokens, the network of `spec` knows. Raises InputError as `build`."""
    with _library(spec.name) as transformers:
        config = dict(spec.args)
        complete = transformers.AutoConfig.for_model(str(config.pop("model_type", "nothing")), **config)
        return int(complete.vocab_size), max(1, int(getattr(complete, "type_vocab_size", None) or 1))


def start(model: nn.Module, name: str) -> list[str]:
    """Load the pre-trained weights of `name` into `model`, in place. Returns the names of tensors that it lacks.

    Those are usually the classifier's. Raises InputError where there are no weights, or they do not fit.
    """
    with _library(name) as transformers:
        pretrained, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            _where(name), config=model.config, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
        )
    model.load_state_dict(pretrained.state_dict())
    return sorted(info["missing_keys"])


def write_tiny(folder: Path, words: Iterable[str]) -> None:
    """Write a tiny MobileBERT with random weights, and a tokenizer that knows `words`, to `folder`: for smoke runs."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    narrow = dict.fromkeys(("embedding_size", "intra_bottleneck_size", "true_hidden_size"), 16)
    few = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_feedforward_networks"), 2)
    wide = {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 128}
    with _library("the network of a smoke run") as transformers:
        config = transformers.MobileBertConfig(**narrow, **few, **wide, vocab_size=len(vocabulary))
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")


def tokenizer(name: str) -> str:
    """Return the tokenizer.json of `name`, with its padding token. Raises InputError where it has none of that form."""
    with _library(name) as transformers:
        loaded = transformers.AutoTokenizer.from_pretrained(_where(name), trust_remote_code=False)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or loaded.pad_token is None:
        raise InputError(f"the tokenizer of {name} has no tokenizer.json with a padding token: give one that has")
    backend.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return str(backend.to_str())


def _where(name: str) -> str:
    return NAMED.get(name) or name.removeprefix("text:")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the keys of a configuration that must not be in a checkpoint."""
    return {key: value for key, value in config.items() if key not in LEFT_OUT and not key.startswith("_")}


@contextmanager
def _library(name: str) -> "Iterator[Any]":
    """Give transformers, without its progress bars and warnings.

    Raises InputError where it is not installed, and for every exception that it raises in the block.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"{name} needs transformers, which is not installed: pip install 'r2cli[text]'")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:  # files, the hub and configurations raise many kinds, with no common class
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"transformers cannot load {name} ({why}): give --model text:DIR, or text: and a name on the hub"
        ) from error
