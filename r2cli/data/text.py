"""Texts with labels in GLUE's tab-separated form: `qnli:FILE.tsv`, or a folder with train.tsv and dev.tsv.

The first line of a file names its columns: `label`, one or two columns of text, and perhaps `index`. If there is only
one file, the same rows of it are held out in every run. The tokenizer is the network's own: a tokenizer.json that the
checkpoint contains. Reading it runs no code, and every machine makes the same tokens.
"""

import base64
import csv
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2cli.data.request import Data, Request
from r2cli.data.splits import TextSplit
from r2cli.errors import InputError
from r2cli.storage.input_spec import InputSpec

TEST = 1000  # rows of a single file that are held out, but never more than a fifth of it
LENGTH = 128  # tokens; the usual length for GLUE
MOST_TOKENS = 2**31 - 1  # of a vocabulary: ids are int32
ROWS = 3  # rows of a text's tensor: ids, mask, types
NOT_TEXT = ("index", "idx", "id", "label")


def load(request: Request) -> Data:
    """Load and tokenize texts. Raises InputError for a missing file, another form, or fewer than two labels."""
    spec = request.spec or _input_spec(request)
    if not isinstance(spec, InputSpec) or not spec.is_text:
        raise InputError(
            f"{request.kind} holds text and the network reads images: give the --data that it was made for"
        )
    where = Path(request.where)
    if where.is_dir():
        halves = [_read(where / name) for name in ("train.tsv", "dev.tsv")]
    else:
        rows = _read(where)
        # The seed is fixed: a test row must never have been a training row of an earlier command.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = min(TEST, len(rows) // 5)
        halves = [[rows[i] for i in sorted(part)] for part in (order[held_out:], order[:held_out])]
    if not halves[1]:
        raise InputError(f"{where} has {len(halves[0])} rows, too few to hold some out: give more")
    names = request.classes_of(label for half in halves for _, label in half)
    if len(names) < 2:
        raise InputError(f"{where} has one label, '{names[0]}': a classifier needs at least two")
    splits = []
    for name, half in zip(("train", "dev"), halves, strict=True):
        labels = torch.tensor([names.index(label) for _, label in half])
        splits.append(TextSplit(name, encoded([texts for texts, _ in half], spec), labels))
    return Data(f"{request.kind}:{where}", spec, names, splits[0], splits[1])


def _input_spec(request: Request) -> InputSpec:
    """Return the preprocessing that was asked for. Raises InputError for options that do not apply to text."""
    if request.tokenizer is None:
        raise InputError(f"{request.kind} holds text: give --model text:DIR, or --model mobilebert")
    for option, value in (("--mean", request.mean), ("--std", request.std)):
        if value is not None:
            raise InputError(f"{option} does not apply to text: only images have one")
    size = request.size or LENGTH
    if isinstance(size, tuple):
        raise InputError(f"--size {size[0]}x{size[1]} is that of an image: give a number of tokens")
    return InputSpec(ROWS, size, size, (), (), request.tokenizer)


def _read(path: Path) -> list[tuple[tuple[str, ...], str]]:
    """Return the texts and the label of every row. Raises InputError for a missing file, or one of another form."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            # GLUE's files have no quoting: a quotation mark is part of the text.
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): give qnli:FILE.tsv, or a folder with train.tsv") from error
    head = lines[0] if lines else []
    columns = [i for i, name in enumerate(head) if name not in NOT_TEXT]
    if "label" not in head or len(columns) not in (1, 2):
        raise InputError(
            f"{path} is not in GLUE's form: its first line must name a column label, and one or two of text"
        )
    label, rows = head.index("label"), []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(head):
            raise InputError(f"{path}: line {number} has {len(line)} columns, the first line {len(head)}: correct it")
        rows.append((tuple(line[i] for i in columns), line[label]))
    if not rows:
        raise InputError(f"{path} has no rows below its first line: give some")
    return rows


def encoded(texts: Sequence[tuple[str, ...]], spec: InputSpec) -> Tensor:
    """Turn n texts, or pairs of texts, into tokens int32 (n, 3, length). Long ones are cut, short ones padded."""
    tokenizer = _tokenizer(spec.tokenizer)
    pad: dict[str, Any] = tokenizer.padding or {}
    tokenizer.enable_truncation(spec.size)
    tokenizer.enable_padding(length=spec.size, **{key: pad[key] for key in ("pad_id", "pad_token") if key in pad})
    encodings = tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
    if any(max(one.ids + one.type_ids, default=0) > MOST_TOKENS for one in encodings):
        raise InputError(f"the tokenizer in the file gives numbers above {MOST_TOKENS}: write the file again")
    return torch.tensor([[one.ids, one.attention_mask, one.type_ids] for one in encodings], dtype=torch.int32)


def pack_tokenizer(tokenizer: str) -> str:
    """Compress a tokenizer.json to text for a checkpoint's JSON, which halves its size."""
    return base64.b64encode(zlib.compress(tokenizer.encode(), 9)).decode()


def _tokenizer(packed: str) -> Any:
    """Undo `pack_tokenizer`, and make the tokenizer. Raises InputError for a missing library or a damaged text."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("text needs transformers, which is not installed: pip install 'r2cli[text]'") from error
    try:
        return Tokenizer.from_str(zlib.decompress(base64.b64decode(packed)).decode())
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"the tokenizer in the file is damaged ({error}): write the file again") from error
