"""The methods that there are, by the names that the command line knows: one dict a kind, one entry a method.

An entry says where the method's object is, and what must be known of it before torch is imported: the bits that it has,
its defaults, whether it looks at images. `load` imports the object when it is first needed, so that nothing here costs
`r2 --help` any time. docs/methods.md shows how a method is added.

Packages of their own add methods by entry points of the group `r2cli.methods`: the name is KIND:NAME, for example
`qat:toy`, and the value `module:ENTRY` is an entry of that kind. They are read when a name is asked for that is not
here, or when all names are listed.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from r2cli.errors import InputError, unknown

GROUP = "r2cli.methods"
SMALL_IMAGE = 64  # pixels: up to here a regularizer's `small` strength is the default
FEW_IMAGES = 10_000  # below it `few` is
DFQ_PARTS = ("equalize", "absorb", "correct")


@dataclass(frozen=True)
class Entry:
    """One method: its object is the attribute in `where`, "module:attribute"; `help` is one line."""

    where: str
    help: str


@dataclass(frozen=True)
class RegularizerEntry(Entry):
    """A regularizer; the object is a `train.range_penalties.RangePenalty`.

    `strength` is the default; `small` is that of images up to 64 pixels, and `few` that of fewer than 10,000 of them.
    """

    strength: float = 0.01
    small: float | None = None
    few: float | None = None


@dataclass(frozen=True)
class PtqEntry(Entry):
    """A method of post-training quantization; the object is a `ptq.ptq_method.PtqMethod`."""

    looks: bool = False  # at images, so that it cannot do without any
    dataless: bool = False  # looks at no images unless the command line names some
    parts: tuple[str, ...] = ()  # what of DFQ it does before it rounds
    mse_to: int = 0  # up to so many bits the ranges of weights are those of least squares by default
    tried: bool = False  # by `auto`, where rounding to the nearest level is not enough
    chooses: bool = False  # among the other methods: `auto`, whose object is the function that does


@dataclass(frozen=True)
class QatEntry(Entry):
    """A method of training with quantizers; the object is a `qat.qat_method.QatMethod`.

    `bits` are the least and the most that its weights can have, and `why` says why there are no others.
    `options` is a frozen dataclass with the defaults of the options that this method alone has.
    """

    bits: tuple[int, int] = (1, 8)
    why: str = ""
    lr: float = 0.05  # of the weights, at its peak
    quantizer_lr: float | None = None  # of steps and ranges; None: as the weights'
    clip_grad: float = 1.0  # most length of the gradient, all weights together
    warm_up: float = 0.05  # share of the steps that the rate rises
    options: Any = None


@dataclass(frozen=True)
class PaletteEntry(Entry):
    """A method of palettes. The object of one that `trains` is a class as `palettes.learners.Learner`; that of one
    that does not is a function as `palettes.tables.start`. `options` are as a `QatEntry`'s.
    """

    trains: bool = True
    soft: bool = False  # its first epochs train through soft assignments
    files: bool = False  # does without a network: any file of weights is enough
    lr: float = 0.02  # of the weights, at its peak
    adamw_lr: float = 1e-4  # the same by AdamW
    lut_lr: float = 1e-4  # of centroids that are parameters
    clip_grad: float | None = None  # most length of the gradient, all weights together; None: any
    clip_grad_few: float | None = None  # the same at 1 and 2 bits; None: as `clip_grad`
    clip_ratio: float | None = None  # most length of a layer's gradient, as a share of its weights'; None: any
    warm_up: float = 0.05  # share of the steps that the rate rises
    options: Any = None


@dataclass(frozen=True)
class LsqOptions:
    bin_reg: float = 0.0  # strength of bin regularization, in the second half of the epochs


@dataclass(frozen=True)
class EwgsOptions:
    delta: float | None = 1e-3  # the authors' alternative to the Hessian's trace, which is None


@dataclass(frozen=True)
class DkmOptions:
    iterations: int = 3  # of k-means, a step


REGULARIZERS: dict[str, RegularizerEntry] = {
    "linf": RegularizerEntry("r2cli.train.range_penalties:LINF", "the largest weight", small=0.1),
    "margin": RegularizerEntry(
        "r2cli.train.range_penalties:MARGIN", "a learned margin, and what is outside it", small=0.03, few=0.1
    ),
    "soft-minmax": RegularizerEntry(
        "r2cli.train.range_penalties:SOFT_MINMAX", "a soft maximum less a soft minimum", small=0.1
    ),
    "kure": RegularizerEntry("r2cli.train.range_penalties:KURE", "the distance to a uniform distribution's kurtosis"),
    "clip": RegularizerEntry(
        "r2cli.train.range_penalties:CLIP", "weights are clamped after every step", strength=2.0
    ),  # deviations: where the margin starts, between what linf (1.7) and kure (2.5) leave of digits' networks
}

PTQ_METHODS: dict[str, PtqEntry] = {
    "none": PtqEntry("r2cli.ptq.ptq_method:NEAREST", "to the nearest level"),
    "dfq": PtqEntry(
        "r2cli.ptq.ptq_method:NEAREST",
        "channels equalized, biases corrected, without data unless --data or --calibration is given",
        dataless=True,
        parts=DFQ_PARTS,
    ),
    "adaround": PtqEntry("r2cli.ptq.adaround:METHOD", "by each layer's output", looks=True),
    "brecq": PtqEntry(
        "r2cli.ptq.brecq:METHOD", "by each block's, with scales and biases", looks=True, mse_to=4, tried=True
    ),
    "auto": PtqEntry("r2cli.ptq.auto:choose", "the best of these", looks=True, chooses=True),
}

_NO_ZERO = "its levels have no zero and leave int8 at 8 bits"

QAT_METHODS: dict[str, QatEntry] = {
    "lsq": QatEntry(
        "r2cli.qat.lsq:METHOD",
        "learned steps",
        bits=(2, 8),
        why="at 1 bit its highest level is 0",
        options=LsqOptions(),
    ),
    "ewgs": QatEntry(
        "r2cli.qat.ewgs:METHOD",
        "gradients scaled by the distance to the level",
        bits=(1, 7),
        why=_NO_ZERO,
        quantizer_lr=1e-3,  # by Adam: the authors' 1e-5 is for 400 epochs
        options=EwgsOptions(),
    ),
    "dorefa": QatEntry("r2cli.qat.dorefa:METHOD", "weights squeezed by a tanh", bits=(1, 7), why=_NO_ZERO),
    "pact": QatEntry(
        "r2cli.qat.pact:METHOD", "learned bounds of activations, with dorefa's weights", bits=(1, 7), why=_NO_ZERO
    ),
}

PALETTE_METHODS: dict[str, PaletteEntry] = {
    "kmeans": PaletteEntry("r2cli.palettes.tables:start", "no training", trains=False, files=True),
    "dkm": PaletteEntry(
        "r2cli.palettes.learners:Dkm",
        "through soft assignments",
        soft=True,
        clip_grad=1.0,
        clip_grad_few=5.0,  # where many centroids share a small layer's weights its softmax is steep
        clip_ratio=0.3,  # a network with small weights, as after soft-min-max, is thrown out without it
        options=DkmOptions(),
    ),
    "shared": PaletteEntry("r2cli.palettes.learners:Shared", "k-means' codes, centroids trained"),
}

# The method where none is named: for a network, and for a file of weights without one.
PALETTE_METHOD, PALETTE_METHOD_OF_FILES = "dkm", "kmeans"

# The kinds by their names in entry points: the dict, the class of its entries, and its word in errors.
_KINDS: Mapping[str, tuple[dict[str, Any], type[Entry], str]] = {
    "regularizer": (REGULARIZERS, RegularizerEntry, "regularizer"),
    "ptq": (PTQ_METHODS, PtqEntry, "method"),
    "qat": (QAT_METHODS, QatEntry, "method"),
    "palette": (PALETTE_METHODS, PaletteEntry, "method"),
}

AnEntry = TypeVar("AnEntry", bound=Entry)


def names(kind: Mapping[str, Entry]) -> tuple[str, ...]:
    """The names of a kind's methods, those of other packages too."""
    read_entry_points()
    return tuple(kind)


def get(kind: Mapping[str, AnEntry], name: str) -> AnEntry:
    """The entry of a method. Raises InputError for a name that nobody has, with the nearest one."""
    if name not in kind and name not in names(kind):
        raise unknown(_word(kind), name, names(kind))
    return kind[name]


def load(kind: Mapping[str, Entry], name: str) -> Any:
    """The object of a method, imported. Raises InputError for a name that nobody has, and where nothing is there."""
    return _imported(get(kind, name).where, f"the {_word(kind)} '{name}'")


def one_of(kind: Mapping[str, Entry], *others: str) -> Callable[[str], None]:
    """A check that a name is a method's or one of `others`. It raises InputError, which names the nearest."""

    def check(name: str) -> None:
        if name not in kind and name not in (*others, *names(kind)):
            raise unknown(_word(kind), name, (*others, *names(kind)))

    return check


def described(kind: Mapping[str, Entry]) -> str:
    """One line of help: r2's own methods, each with what it does."""
    return "; ".join(f"{name}: {entry.help}" for name, entry in kind.items())


@functools.cache
def read_entry_points() -> None:
    """Add the methods of other packages, once. Raises InputError for an entry point that is none of r2's kinds."""
    from importlib import metadata  # here, so that no command waits for it that asks for what is known

    for point in metadata.entry_points(group=GROUP):
        who = f"the entry point '{point.name}' of {point.dist.name if point.dist else GROUP}"
        prefix, _, name = point.name.partition(":")
        if prefix not in _KINDS or not name:
            raise InputError(f"{who} is no KIND:NAME, of a kind among {', '.join(_KINDS)}: mend or uninstall it")
        kind, wanted, _ = _KINDS[prefix]
        if name in kind:
            raise InputError(f"{who} has a name that is taken: give it another one, or uninstall it")
        entry = _imported(point.value, who)
        if not isinstance(entry, wanted):
            raise InputError(f"{who} is a {type(entry).__name__} and no {wanted.__name__}: mend or uninstall it")
        kind[name] = entry


def default_strength(name: str, *, size: int, images: int, is_text: bool = False) -> float:
    """The strength of a regularizer where none is given: the paper's 0.01 for ImageNet-size training and for text; for
    small images (`size` in pixels, `images` of them) what measured best."""
    entry = get(REGULARIZERS, name)
    if is_text or size > SMALL_IMAGE:
        return entry.strength
    found = entry.few if images < FEW_IMAGES and entry.few is not None else entry.small
    return entry.strength if found is None else found


def usual_weight_range(name: str, bits: int) -> str:
    """The rule for ranges of weights of so many bits: what is learned from few levels starts best where they lie
    best."""
    return "mse" if bits <= get(PTQ_METHODS, name).mse_to else "minmax"


def default_clip_grad(name: str, bits: int) -> float | None:
    """The most length of the gradient with a method of `PALETTE_METHODS` at so many bits; None: any."""
    entry = get(PALETTE_METHODS, name)
    return entry.clip_grad if bits > 2 or entry.clip_grad_few is None else entry.clip_grad_few


def require_bits(name: str, bits: int, what: str) -> None:
    """Raises InputError for bits that the weights of a method of `QAT_METHODS` cannot have, with the reason."""
    entry = get(QAT_METHODS, name)
    least, most = entry.bits
    if not least <= bits <= most:
        why = f": {entry.why}" if entry.why else ""
        raise InputError(f"{what} is impossible with {name}{why}; give {least} to {most}")


def single_options(kind: Mapping[str, QatEntry | PaletteEntry]) -> set[str]:
    """The names of the options that single methods of a kind have, as their entries declare them."""
    return {field.name for entry in kind.values() if is_dataclass(entry.options) for field in fields(entry.options)}


def own_options(entry: QatEntry | PaletteEntry, given: Mapping[str, Any]) -> Any:
    """The method's own options, with those of `given` that it has; None where it has none."""
    if not is_dataclass(entry.options):
        return None
    own = {field.name for field in fields(entry.options)}
    return replace(entry.options, **{name: value for name, value in given.items() if name in own})  # type: ignore[type-var]


def require_own(kind: Mapping[str, QatEntry | PaletteEntry], name: str, given: Mapping[str, Any]) -> None:
    """Raises InputError for an option in `given` that other methods have and this one has not, unless it has the
    default."""
    for option, value in given.items():
        owners = {other: entry.options for other, entry in kind.items() if hasattr(entry.options, option)}
        if owners and name not in owners and value not in [getattr(own, option) for own in owners.values()]:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(f"{flag} belongs to --method {' or '.join(owners)}, and {name} has nothing like it")


def _word(kind: Mapping[str, Entry]) -> str:
    return next((word for known, _, word in _KINDS.values() if known is kind), "method")


def _imported(where: str, who: str) -> Any:
    """The object at "module:attribute". Raises InputError where there is none."""
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{who} cannot be loaded from {where} ({error}): reinstall the package it is of") from error
