"""The options of `ptq` and `palettize`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.config import groups, layer_form, mixed, targets, values
from r2cli.config.mixed import MixedPrecision
from r2cli.config.option import Config, meanings, option
from r2cli.errors import InputError

PALETTE_TRAINING = "Training (dkm, shared)"


@dataclass(frozen=True)
class PtqConfig(MixedPrecision):
    """Quantize a trained network without training."""

    weight_bits: int | None = option(
        None,
        "Bits of weights, 8 to 1; 1 bit has two levels and no zero. (default: 8)",
        check=values.bits("--weight-bits"),
    )
    act_bits: int | str = option(
        "8", "Bits of activations, 8 to 4, 16, or none to leave them float.", check=values.act_bits, given=str
    )
    method: str = option(
        registry.PTQ_NEAREST,
        f"How weights are rounded. {registry.described(registry.PTQ_METHODS)}.",
        check=registry.one_of(registry.PTQ_METHODS),
    )
    granularity: str | None = option(
        None,
        "Grids of a weight. channel: one per output channel; tensor: one, after folding BatchNorm; unfolded: one on "
        "the weight as trained, with BatchNorm in per-channel scales. (default: channel; auto tries unfolded too)",
        check=values.one_of("--granularity", "channel", "tensor", "unfolded"),
    )
    group_size: int | None = groups.group_size()
    weight_range: str | None = option(
        None,
        "Rule for ranges of weights: minmax, percentile[:99.99] or mse. "
        "(default: minmax; for brecq mse up to 4 bits and with mixed precision)",
        check=values.range_rule("--weight-range", *values.WEIGHT_RANGES),
    )
    symmetric: bool = option(
        True, "Weight grids with the zero point 0, or each with its own.", "--symmetric/--asymmetric"
    )
    act_range: str | None = groups.act_range()
    keep: groups.Keep = groups.keep(
        "PATTERN=BITS, or words between commas, for some layers: 4, W4A8 (weights and what they read), W8A16, float, "
        "channel, tensor, unfolded, asymmetric, mse; repeatable.",
        values.keep,
    )
    embeddings: bool = groups.embeddings()
    parts: str | Sequence[str] | None = option(
        None,
        "Parts of dfq that are done: equalize,absorb,correct or some of them, or none.",
        check=values.parts,
        given=str | None,
    )
    relu6: str = option(
        "clip",
        "What equalization makes of ReLU6. clip: the same function, with a bound per channel; relu: a ReLU instead.",
        check=values.one_of("--relu6", "clip", "relu"),
    )
    qdrop: bool = option(
        False,
        "brecq: round activations of fewer than 8 bits by chance while a block learns, and learn their steps too "
        "(QDrop); it takes twice the time.",
    )
    steps: int | None = option(
        None,
        "Steps of learning for a layer (adaround) or a block (brecq). More take longer and come nearer to float. "
        "(default: 500 for adaround, 600 for brecq)",
        least=1,
    )
    calibration: int | None = option(
        None,
        "Number of training images that set the ranges of activations; 0: BatchNorm's statistics set them. "
        "(default: 512; 0 for dfq without --data)",
        least=0,
    )
    target: str = groups.target()
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        mixed.require_mixed(self)
        if self.parts is not None and registry.get(registry.PTQ_METHODS, self.method).chooses:
            raise InputError(f"--method {self.method} chooses the --parts itself: leave one of the two out")
        if self.calibration == 0 and self.act_range is not None:
            raise InputError(
                f"--act-range {self.act_range} looks at images: give --calibration, or leave it to the BatchNorms"
            )
        groups.require_act_range(self, values.act_bits(self.act_bits))
        self._require_qdrop()
        self._require_steps()
        self._require_equalization()
        groups.require_groups(self)
        targets.require(
            self.target,
            act_bits=values.act_bits(self.act_bits),
            zero_points=not self.symmetric,
            per_channel=self.granularity in (None, "channel"),
        )
        groups.require_forms(self, least=4)

    def _require_qdrop(self) -> None:
        entry = registry.get(registry.PTQ_METHODS, self.method)
        if self.qdrop and not (entry.drops or entry.chooses):
            raise InputError(f"--qdrop belongs to --method brecq, and {self.method} learns no blocks: leave it out")
        acts = [values.act_bits(self.act_bits), *(one.act_bits for one in layer_form.all_of(values.keep(self.keep)))]
        if self.qdrop and not any(bits is not None and bits < layer_form.MOST_BITS for bits in acts):
            raise InputError("--qdrop is for activations of fewer than 8 bits: give --act-bits 4, or leave it out")

    def _require_steps(self) -> None:
        entry = registry.get(registry.PTQ_METHODS, self.method)
        if self.steps is not None and not (entry.learns or entry.chooses):
            raise InputError(f"--steps are those of methods that learn, and {self.method} only rounds: leave it out")

    def _require_equalization(self) -> None:
        entry = registry.get(registry.PTQ_METHODS, self.method)
        equalizes = bool(entry.parts or entry.equalizes or entry.chooses or self.parts)
        if self.relu6 != "clip" and not equalizes:
            raise InputError(f"--relu6 is for equalization, and {self.method} does none: give --parts, or leave it out")

    @property
    def suffix(self) -> str:
        """The part of the output's name that says what was done, for example 'w4a8-none-unfolded'."""
        mean = f"{self.target_bits:g}" if self.target_bits else f"{self.weight_bits or 8}"
        wanted = f"{self.target_bytes}B" if self.target_bytes else mean
        wanted = f"-least-{self.minimize}-" if self.minimize else f"-cost{self.budget:g}-" if self.cost else wanted
        acts = values.act_bits(self.act_bits)
        grid = "" if self.granularity in (None, "channel") else f"-{self.granularity}"
        grid += f"-g{self.group_size}" if self.group_size else ""
        return f"w{wanted}{f'a{acts}' if acts else ''}-{self.method}{grid}{groups.for_target(self.target)}"


@dataclass(frozen=True)
class PalettizeConfig(Config):
    """Compress weights to indices into small tables of centroids."""

    bits: int = option(4, "A table has 2**BITS centroids; 1 to 8.", check=values.bits("--bits"))
    dim: int = option(
        1,
        "Values in a centroid: 1, 2, 4 or 8. A weight takes BITS / DIM bits.",
        check=values.number_of("--dim", 1, 2, 4, 8),
    )
    method: str | None = option(
        None,
        f"How centroids are found. {registry.described(registry.PALETTE_METHODS)}. "
        f"(default: {registry.PALETTE_METHOD}; {registry.PALETTE_METHOD_OF_FILES} for a file that is no r2 checkpoint)",
        check=registry.one_of(registry.PALETTE_METHODS),
    )
    group_size: int | None = option(
        None,
        "Number of output channels that share a table; a layer that it does not divide has one table. (default: all)",
        least=1,
    )
    lut_bits: int = option(
        8, "Bits of tables. 8: int8 with a scale; 32: float32.", check=values.number_of("--lut-bits", 8, 32)
    )
    act_bits: int | str | None = option(
        None,
        "Bits of activations, 8 to 4, or none to leave them float. (default: 8; none with --lut-bits 32)",
        check=values.act_bits,
        given=str | None,
    )
    act_range: str | None = groups.act_range()
    keep: Mapping[str, object] | Sequence[str] = groups.keep(
        "PATTERN=BITS or PATTERN=BITSxDIM: another palette for some layers; repeatable.", values.keep_forms
    )
    embeddings: bool = groups.embeddings()
    loss: str | None = groups.loss("what goes with --metric; without labels distill")
    weigh: str = option(
        "none",
        "kmeans: weights of the errors. none, or fisher: squared gradients on training images.",
        check=values.one_of("--weigh", "none", "fisher"),
    )
    epochs: int = option(8, "Passes over the data.", least=1, panel=PALETTE_TRAINING)
    hard_epochs: int = option(
        2, "dkm: how many of the epochs, at the end, have hard assignments.", least=0, panel=PALETTE_TRAINING
    )
    temperature: float = option(
        0.5,
        "dkm: temperature of the first epoch, as a share of a layer's mean squared distance; it falls to a tenth.",
        least=0.001,
        panel=PALETTE_TRAINING,
    )
    iterations: int = option(3, "dkm: k-means iterations per step.", least=1, most=20, panel=PALETTE_TRAINING)
    batch_size: int = option(64, "Images per step.", least=2, panel=PALETTE_TRAINING)
    optimizer: str | None = groups.optimizer()
    lr: float | None = option(None, "Peak learning rate. (default: 0.02; adamw 1e-4)", least=0, panel=PALETTE_TRAINING)
    lut_lr: float | None = option(
        None, "shared: peak learning rate of the centroids. (default: 0.0001)", least=0, panel=PALETTE_TRAINING
    )
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1, panel=PALETTE_TRAINING)
    clip_grad: float | None = option(
        None,
        "The greatest norm of the gradient of all weights together; 0: no limit. "
        "(default: for dkm 1, and 5 at 1 and 2 bits)",
        least=0,
        panel=PALETTE_TRAINING,
    )
    clip_ratio: float | None = option(
        None,
        "The greatest norm of a layer's gradient, as a share of its weights' norm; 0: no limit. (default: for dkm 0.3)",
        least=0,
        panel=PALETTE_TRAINING,
    )
    weight_decay: float = option(4e-5, "L2 on weights.", least=0, panel=PALETTE_TRAINING)
    precision: str = option(
        "float32",
        "float32, bfloat16 (mixed), or auto: bfloat16 on a GPU that has it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    )
    calibration: int | None = option(
        None,
        "Number of training images for BatchNorm's statistics and ranges of activations; 0: none. (default: 512)",
        least=0,
    )
    target: str = groups.target()
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_bits and self.lut_bits != 8:
            raise InputError(
                f"--act-bits {self.activation_bits} needs integer weights: give --lut-bits 8, or --act-bits none"
            )
        groups.require_act_range(self, self.activation_bits)
        registry.require_own(registry.PALETTE_METHODS, self.method or registry.PALETTE_METHOD, self.own_options)
        targets.require(self.target, act_bits=self.activation_bits, integers=self.lut_bits == 8)

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that single methods have, as their entries declare them."""
        return meanings(self, registry.single_options(registry.PALETTE_METHODS))

    @property
    def activation_bits(self) -> int | None:
        """The bits of activations; None if they stay float."""
        if self.act_bits is None:
            return 8 if self.lut_bits == 8 else None
        return values.act_bits(self.act_bits)

    def suffix(self, method: str) -> str:
        """Return the part of the output's name that says what was done, for example 'b2d2-dkm'."""
        group = f"g{self.group_size}" if self.group_size else ""
        return f"b{self.bits}d{self.dim}{group}-{method}{groups.for_target(self.target)}"
