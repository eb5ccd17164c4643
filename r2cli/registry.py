"""All methods, by their names on the command line: one dict for each kind, and one entry for each method.

An entry says where the object of the method is, and what must be known about it before torch is imported: the bits that
it supports, its defaults, and whether it looks at images. `load` imports the object when it is first needed, so
`r2 --help` stays fast. docs/methods.md shows how to add a method.

Other packages add methods by entry points of the group `r2cli.methods`. The name is KIND:NAME, for example `qat:toy`,
and the value `module:ENTRY` is an entry of that kind. They are read when all names are listed, or when a name is asked
for that is not here.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from r2cli.errors import InputError, unknown

GROUP = "r2cli.methods"
SMALL_IMAGE = 64  # pixels: for images up to this size a regularizer's `small` strength is the default
FEW_IMAGES = 10_000  # and `few` for fewer images than this
DFQ_PARTS = ("equalize", "absorb", "correct")


@dataclass(frozen=True)
class Entry:
    """One method: its object is the attribute in `where`, "module:attribute"; `help` is one line."""

    where: str
    help: str


@dataclass(frozen=True)
class RegularizerEntry(Entry):
    """A regularizer. Its object is a `train.range_penalties.RangePenalty`.

    `strength` is the default strength, `small` the one for images up to 64 pixels, and `few` the one for fewer than
    10,000 such images.
    """

    strength: float = 0.01
    small: float | None = None
    few: float | None = None


@dataclass(frozen=True)
class PtqEntry(Entry):
    """A method of post-training quantization. Its object is a `ptq.ptq_method.PtqMethod`."""

    looks: bool = False  # it looks at images, and cannot work without them
    dataless: bool = False  # it looks at no images unless the command line names some
    parts: tuple[str, ...] = ()  # the parts of DFQ that it does
    mse_to: int = 0  # up to this many bits, the default range of weights is the one with the least squared error
    equalizes: bool = False  # it works on the equalized network where that is better, if no parts are asked for
    learns: bool = False  # it learns the rounding in steps, whose number can be given
    drops: bool = False  # it can round activations by chance while it learns (QDrop)
    tried: bool = False  # `auto` tries it where rounding to the nearest level is not enough
    chooses: bool = False  # it chooses among the other methods: only `auto`, whose object is a function


@dataclass(frozen=True)
class QatEntry(Entry):
    """A method of quantization-aware training. Its object is a `qat.qat_method.QatMethod`.

    `bits` are the fewest and the most bits that its weights can have, and `why` says why not others. `options` is a
    frozen dataclass with the defaults of the options that only this method has.
    """

    bits: tuple[int, int] = (1, 8)
    why: str = ""
    lr: float = 0.05  # peak learning rate of the weights
    quantizer_lr: float | None = None  # that of steps and ranges; None: the one of the weights
    clip_grad: float = 1.0  # the greatest norm of the gradient of all weights together
    warm_up: float = 0.05  # share of the steps in which the rate rises
    options: Any = None


@dataclass(frozen=True)
class PaletteEntry(Entry):
    """A method for palettes.

    The object of a method that `trains` is a class like `palettes.learners.Learner`. The object of one that does not is
    a function like `palettes.tables.start`. `options` are like those of a `QatEntry`.
    """

    trains: bool = True
    soft: bool = False  # its first epochs train through soft assignments
    files: bool = False  # it needs no network: any file of weights is enough
    lr: float = 0.02  # peak learning rate of the weights
    adamw_lr: float = 1e-4  # the same with AdamW
    lut_lr: float = 1e-4  # that of centroids that are parameters
    clip_grad: float | None = None  # the greatest norm of the gradient of all weights together; None: no limit
    clip_grad_few: float | None = None  # the same at 1 and 2 bits; None: like `clip_grad`
    clip_ratio: float | None = None  # the greatest norm of a layer's gradient as a share of its weights'; None: any
    warm_up: float = 0.05  # share of the steps in which the rate rises
    options: Any = None


@dataclass(frozen=True)
class LsqOptions:
    """The options of LSQ alone."""

    bin_reg: float = 0.0  # strength of bin regularization, in the second half of the epochs
    dampen: float = 0.0  # strength of what dampens oscillations, at the end of the epochs
    freeze: float = 0.0  # the greatest share of steps in which a weight turns back, at the end of the epochs; 0: any


@dataclass(frozen=True)
class EwgsOptions:
    """The options of EWGS alone."""

    delta: float | None = 1e-3  # the authors' cheap alternative; None: from the trace of the Hessian


@dataclass(frozen=True)
class DkmOptions:
    """The options of DKM alone."""

    iterations: int = 3  # iterations of k-means in each step


REGULARIZERS: dict[str, RegularizerEntry] = {
    "linf": RegularizerEntry("r2cli.train.range_penalties:LINF", "the largest weight", small=0.1),
    "margin": RegularizerEntry(
        "r2cli.train.range_penalties:MARGIN", "a learned margin and what lies outside it", small=0.03, few=0.1
    ),
    "soft-minmax": RegularizerEntry(
        "r2cli.train.range_penalties:SOFT_MINMAX", "a soft maximum minus a soft minimum", small=0.1
    ),
    "kure": RegularizerEntry(
        "r2cli.train.range_penalties:KURE", "the distance of the kurtosis from a uniform distribution's"
    ),
    # 2 deviations is where the margin starts. Networks on digits end at 1.7 with linf, and at 2.5 with kure.
    "clip": RegularizerEntry(
        "r2cli.train.range_penalties:CLIP", "no penalty; weights are clamped after every step", strength=2.0
    ),
}

PTQ_METHODS: dict[str, PtqEntry] = {
    "none": PtqEntry("r2cli.ptq.ptq_method:NEAREST", "to the nearest level"),
    "dfq": PtqEntry(
        "r2cli.ptq.ptq_method:NEAREST",
        "to the nearest level, with equalized channels and corrected biases; it needs no data, but uses --data or "
        "--calibration",
        dataless=True,
        parts=DFQ_PARTS,
    ),
    "adaround": PtqEntry(
        "r2cli.ptq.adaround:METHOD", "so that each layer's output changes least", looks=True, learns=True
    ),
    "brecq": PtqEntry(
        "r2cli.ptq.brecq:METHOD",
        "so that each block's output changes least, with scales and biases learned too",
        looks=True,
        mse_to=4,
        equalizes=True,
        learns=True,
        drops=True,
        tried=True,
    ),
    "auto": PtqEntry("r2cli.ptq.auto:choose", "tries these and keeps the best", looks=True, chooses=True),
}

# The methods that messages send a user to: the one that only rounds, and the one that needs no images.
PTQ_NEAREST, PTQ_DATALESS = "none", "dfq"

_NO_ZERO = "its levels have no zero, and at 8 bits they do not fit int8"

QAT_METHODS: dict[str, QatEntry] = {
    "lsq": QatEntry(
        "r2cli.qat.lsq:METHOD",
        "learns the steps between levels",
        bits=(2, 8),
        why="at 1 bit its highest level is 0",
        options=LsqOptions(),
    ),
    "seq": QatEntry("r2cli.qat.seq:METHOD", "as lsq, with levels without zero at 2 bits and 1", bits=(1, 8)),
    "ewgs": QatEntry(
        "r2cli.qat.ewgs:METHOD",
        "scales gradients by the distance to the level",
        bits=(1, 7),
        why=_NO_ZERO,
        quantizer_lr=1e-3,  # by Adam: the authors' 1e-5 is for 400 epochs
        options=EwgsOptions(),
    ),
    "dorefa": QatEntry("r2cli.qat.dorefa:METHOD", "maps weights to the levels by a tanh", bits=(1, 7), why=_NO_ZERO),
    "pact": QatEntry(
        "r2cli.qat.pact:METHOD", "learns bounds of activations; its weights are dorefa's", bits=(1, 7), why=_NO_ZERO
    ),
}

PALETTE_METHODS: dict[str, PaletteEntry] = {
    "kmeans": PaletteEntry("r2cli.palettes.tables:start", "without training", trains=False, files=True),
    "dkm": PaletteEntry(
        "r2cli.palettes.learners:Dkm",
        "trains through soft assignments",
        soft=True,
        # At 3 bits and more, many centroids share the weights of a small layer, which makes the softmax steep.
        clip_grad=1.0,
        clip_grad_few=5.0,
        clip_ratio=0.3,  # without it, steps throw a network with small weights, as after soft-min-max, off course
        options=DkmOptions(),
    ),
    "shared": PaletteEntry("r2cli.palettes.learners:Shared", "trains the centroids under the codes of k-means"),
}

# The default methods: for a network, and for a file of weights without one.
PALETTE_METHOD, PALETTE_METHOD_OF_FILES = "dkm", "kmeans"

# The kinds by their names in entry points: the dict, the class of its entries, and the word for it in messages.
_KINDS: Mapping[str, tuple[dict[str, Any], type[Entry], str]] = {
    "regularizer": (REGULARIZERS, RegularizerEntry, "regularizer"),
    "ptq": (PTQ_METHODS, PtqEntry, "method"),
    "qat": (QAT_METHODS, QatEntry, "method"),
    "palette": (PALETTE_METHODS, PaletteEntry, "method"),
}

AnEntry = TypeVar("AnEntry", bound=Entry)


def names(kind: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the names of a kind's methods, also those of other packages."""
    read_entry_points()
    return tuple(kind)


def get(kind: Mapping[str, AnEntry], name: str) -> AnEntry:
    """Return the entry of a method. Raises InputError for an unknown name, with the nearest one."""
    if name not in kind and name not in names(kind):
        raise unknown(_word(kind), name, names(kind))
    return kind[name]


def load(kind: Mapping[str, Entry], name: str) -> Any:
    """Import and return the object of a method. Raises InputError for an unknown name, and if the object is missing."""
    return _imported(get(kind, name).where, f"the {_word(kind)} '{name}'")


@dataclass(frozen=True)
class MethodName:
    """A check that a name is a method's or one of `others`. It raises InputError, which names the nearest."""

    kind: Mapping[str, Entry]
    others: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """Every name, also those of other packages."""
        return (*self.others, *names(self.kind))

    def __call__(self, name: str) -> None:
        if name not in self.kind and name not in self.choices:
            raise unknown(_word(self.kind), name, self.choices)


def one_of(kind: Mapping[str, Entry], *others: str) -> MethodName:
    """Return a check that a name is a method's or one of `others`."""
    return MethodName(kind, others)


def described(kind: Mapping[str, Entry]) -> str:
    """Return one line of help: the methods of r2 itself, each with what it does."""
    return "; ".join(f"{name}: {entry.help}" for name, entry in kind.items())


@functools.cache
def read_entry_points() -> None:
    """Add the methods of other packages, once. Raises InputError for an entry point that does not fit any kind."""
    from importlib import metadata  # imported here, so that commands with r2's own methods do not wait for it

    for point in metadata.entry_points(group=GROUP):
        who = f"the entry point '{point.name}' of {point.dist.name if point.dist else GROUP}"
        prefix, _, name = point.name.partition(":")
        if prefix not in _KINDS or not name:
            kinds = ", ".join(_KINDS)
            raise InputError(f"{who} is no KIND:NAME, and kinds are {kinds}: correct the package or uninstall it")
        kind, wanted, _ = _KINDS[prefix]
        if name in kind:
            raise InputError(f"{who} has a name that is taken: give it another one, or uninstall it")
        entry = _imported(point.value, who)
        if not isinstance(entry, wanted):
            raise InputError(
                f"{who} is a {type(entry).__name__} and no {wanted.__name__}: correct the package or uninstall it"
            )
        kind[name] = entry


def default_strength(name: str, *, size: int, images: int, is_text: bool = False) -> float:
    """Return the default strength of a regularizer for `images` images of `size` pixels.

    It is the paper's 0.01 for images of ImageNet's size and for text, and the one that measured best for small images.
    """
    entry = get(REGULARIZERS, name)
    if is_text or size > SMALL_IMAGE:
        return entry.strength
    found = entry.few if images < FEW_IMAGES and entry.few is not None else entry.small
    return entry.strength if found is None else found


def usual_weight_range(name: str, bits: int) -> str:
    """Return the default rule for ranges of weights with `bits`.

    With few levels, a method that learns scales starts best where the squared error is least.
    """
    return "mse" if bits <= get(PTQ_METHODS, name).mse_to else "minmax"


def default_clip_grad(name: str, bits: int) -> float | None:
    """Return the greatest norm of the gradient for a method of `PALETTE_METHODS` with `bits`; None: no limit."""
    entry = get(PALETTE_METHODS, name)
    return entry.clip_grad if bits > 2 or entry.clip_grad_few is None else entry.clip_grad_few


def require_bits(name: str, bits: int, what: str) -> None:
    """Raise InputError, with the reason, for bits that weights cannot have with a method of `QAT_METHODS`."""
    entry = get(QAT_METHODS, name)
    least, most = entry.bits
    if not least <= bits <= most:
        why = f": {entry.why}" if entry.why else ""
        raise InputError(f"{what} is impossible with {name}{why}; give {least} to {most}")


def single_options(kind: Mapping[str, QatEntry | PaletteEntry]) -> set[str]:
    """The names of the options that single methods of a kind have, as their entries declare them."""
    return {field.name for entry in kind.values() if is_dataclass(entry.options) for field in fields(entry.options)}


def own_options(entry: QatEntry | PaletteEntry, given: Mapping[str, Any]) -> Any:
    """Return the method's own options, with the values of `given` that it knows; None if it has no options."""
    if not is_dataclass(entry.options):
        return None
    own = {field.name for field in fields(entry.options)}
    return replace(entry.options, **{name: value for name, value in given.items() if name in own})  # type: ignore[type-var]


def require_own(kind: Mapping[str, QatEntry | PaletteEntry], name: str, given: Mapping[str, Any]) -> None:
    """Raise InputError for an option in `given` that only other methods have, unless its value is the default."""
    for option, value in given.items():
        owners = {other: entry.options for other, entry in kind.items() if hasattr(entry.options, option)}
        if owners and name not in owners and value not in [getattr(own, option) for own in owners.values()]:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(f"{flag} belongs to --method {' or '.join(owners)}, and {name} has nothing like it")


def _word(kind: Mapping[str, Entry]) -> str:
    """Return the word for a kind in messages."""
    return next((word for known, _, word in _KINDS.values() if known is kind), "method")


def _imported(where: str, who: str) -> Any:
    """Return the object at "module:attribute". Raises InputError if there is none."""
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{who} cannot be loaded from {where} ({error}): reinstall the package that it comes from"
        ) from error
