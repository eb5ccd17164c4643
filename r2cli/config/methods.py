"""The options of commands that train or compress: `PretrainConfig`, `PtqConfig`, `QatConfig`, `PalettizeConfig`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.config import groups, targets, values
from r2cli.config.option import FOREIGN, Config, meanings, option
from r2cli.errors import InputError

__all__ = ["FOREIGN", "PalettizeConfig", "PretrainConfig", "PtqConfig", "QatConfig"]

REGULARIZATION, EXTRAS, SCRATCH = "Regularization", "Additions to the training", "From scratch"
PALETTE_TRAINING = "Training (dkm, shared)"
Keep = Mapping[str, int] | Sequence[str]


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Train a float network, with a regularizer of its weights' range."""

    reg: str = option(
        "none",
        f"none; {registry.described(registry.REGULARIZERS)}.",
        panel=REGULARIZATION,
        check=registry.one_of(registry.REGULARIZERS, "none"),
    )
    reg_weight: float | None = option(
        None,
        "Strength; for clip, deviations to clamp to. (default: 0.01, for small images what measured best; clip 2)",
        panel=REGULARIZATION,
        least=0,
    )
    reg_form: str = option(
        "stable",
        "stable, or paper: equations 1 to 3 exactly as written.",
        panel=REGULARIZATION,
        check=values.one_of("--reg-form", "stable", "paper"),
    )
    reg_dim: int = option(1, "Length of the vectors of a later palette.", panel=REGULARIZATION, least=1, most=8)
    reg_lr: float | None = option(
        None,
        "Learning rate of margin's M and soft-minmax's alpha; with adamw, also of the penalty's steps on weights. "
        "(default: --lr; paper form 0.01; adamw 0.1)",
        panel=REGULARIZATION,
        least=0,
    )
    margin_k: int = option(1, "margin: divide the hinge by K; 1 as in the paper.", panel=REGULARIZATION, least=1)
    epochs: int = option(40, "Passes over the data.", least=1)
    batch_size: int = option(64, "Images per step.", least=2)
    optimizer: str | None = groups.optimizer()
    lr: float | None = option(
        None,
        "Peak learning rate; a cosine falls from it to 0. (default: 0.1 for each 64 of --batch-size; adamw 1e-4)",
        least=0,
    )
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1)
    weight_decay: float = option(4e-5, "L2 on weights; 10x L2 is 4e-4.", least=0)
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.", least=0, most=1)
    loss: str | None = groups.loss("what goes with --metric, else cross-entropy")
    label_smoothing: float = option(0.0, "Label smoothing, 0 to 1.", least=0, most=1)
    clip_grad: float | None = option(None, "The greatest norm of the gradient of all weights together.", least=0)
    ema: float | None = option(
        None, "Keep a running average of the weights with this decay, for example 0.999.", least=0, most=1
    )
    precision: str = option(
        "auto",
        "float32, bfloat16 (mixed), or auto: bfloat16 on a GPU that has it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    )
    compile: bool = option(False, "Compile the network (torch.compile).")
    seed: int = groups.seed()
    device: str = groups.device()


@dataclass(frozen=True)
class PtqConfig(Config):
    """Quantize a trained network without training."""

    weight_bits: int | None = option(
        None,
        "Bits of weights, 8 to 1; 1 bit has two levels and no zero. (default: 8)",
        check=values.bits("--weight-bits"),
    )
    target_bits: float | None = option(
        None, "Mixed precision: the average bits per weight, for example 3.2.", check=values.bits("--target-bits")
    )
    target_bytes: int | None = option(None, "Mixed precision: the bytes of all codes and scales.", least=1)
    sensitivity: str = option(
        "hessian",
        "How mixed precision measures layers: hessian, or sqnr, which needs no data.",
        check=values.one_of("--sensitivity", "hessian", "sqnr"),
    )
    act_bits: int | str = option(
        "8", "Bits of activations, 8 to 4, or none to leave them float.", check=values.act_bits, given=str
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
    keep: Keep = groups.keep("PATTERN=BITS: other bits for the weights of some layers; repeatable.", values.keep)
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
        asked = {
            "--weight-bits": self.weight_bits,
            "--target-bits": self.target_bits,
            "--target-bytes": self.target_bytes,
        }
        given = [f"{flag} {value}" for flag, value in asked.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: give one of them")
        if self.parts is not None and registry.get(registry.PTQ_METHODS, self.method).chooses:
            raise InputError(f"--method {self.method} chooses the --parts itself: leave one of the two out")
        if self.calibration == 0 and self.act_range is not None:
            raise InputError(
                f"--act-range {self.act_range} looks at images: give --calibration, or leave it to the BatchNorms"
            )
        groups.require_groups(self)
        targets.require(
            self.target,
            act_bits=values.act_bits(self.act_bits),
            zero_points=not self.symmetric,
            per_channel=self.granularity in (None, "channel"),
        )

    @property
    def suffix(self) -> str:
        """The part of the output's name that says what was done, for example 'w4a8-none-unfolded'."""
        mean = f"{self.target_bits:g}" if self.target_bits else f"{self.weight_bits or 8}"
        wanted = f"{self.target_bytes}B" if self.target_bytes else mean
        acts = values.act_bits(self.act_bits)
        grid = "" if self.granularity in (None, "channel") else f"-{self.granularity}"
        grid += f"-g{self.group_size}" if self.group_size else ""
        return f"w{wanted}{f'a{acts}' if acts else ''}-{self.method}{grid}{groups.for_target(self.target)}"


@dataclass(frozen=True)
class QatConfig(Config):
    """Train a network as it will be deployed, with weights and activations on few levels."""

    weight_bits: int = option(
        4, "Bits of weights: 8 to 2 with lsq, 7 to 1 with the others.", check=values.bits("--weight-bits")
    )
    act_bits: int | str = option(
        "8", "Bits of activations, 8 to 1, or none to leave them float.", check=values.trained_act_bits, given=str
    )
    method: str = option(
        "lsq",
        f"How the levels are trained. {registry.described(registry.QAT_METHODS)}.",
        check=registry.one_of(registry.QAT_METHODS),
    )
    keep: Keep = groups.keep(
        "PATTERN=BITS: other bits for the weights of some layers, and at least as many for their inputs; repeatable.",
        values.keep,
    )
    activations: str = option(
        "outputs",
        "What is rounded. outputs: all that computes, to 8 bits where a sum reads it; inputs: what layers read, as in "
        "the papers.",
        check=values.one_of("--activations", "outputs", "inputs"),
    )
    start: str = option(
        "fitted",
        "Where steps and ranges begin. fitted: where the error is least; paper: as in the method's paper.",
        check=values.one_of("--start", "fitted", "paper"),
    )
    epochs: int = option(20, "Passes over the data.", least=1)
    batch_size: int = option(64, "Images per step.", least=2)
    images: int | None = option(None, "Number of images to train on. (default: all)", least=2)
    lr: float | None = option(None, "Peak learning rate; a cosine falls from it to 0. (default: 0.05)", least=0)
    quantizer_lr: float | None = option(
        None, "Learning rate of steps and ranges. (default: --lr; for ewgs 0.001, by Adam)", least=0
    )
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1)
    clip_grad: float | None = option(
        None,
        "The greatest norm of the gradient of all weights together; 0: no limit. A dead channel has a huge gradient. "
        "(default: 1)",
        least=0,
    )
    ema: float | None = option(
        None,
        "Keep a running average of weights, steps and ranges with this decay, 0.999 for example. (default: none)",
        least=0,
        most=1,
        panel=EXTRAS,
    )
    weight_decay: float | None = option(
        None, "L2 on weights. (default: 1e-4; half of it at 3 bits, a quarter below)", least=0
    )
    loss: str | None = groups.loss("what goes with --metric; without labels distill")
    distill: float = option(0.0, "Weight of the distance to the float network's predictions.", least=0, panel=EXTRAS)
    progressive: bool = option(False, "Train at 8 bits, then at 4, then at the wanted bits.", panel=EXTRAS)
    bin_reg: float = option(
        0.0, "lsq: strength with which the second half draws weights to their levels.", least=0, panel=EXTRAS
    )
    dampen: float = option(
        0.0, "lsq: strength, at the end, with which weights between two levels are dampened.", least=0, panel=EXTRAS
    )
    freeze: float = option(
        0.0,
        "lsq: hold weights that turn back in more than this share of steps, at the end; 0.01 is the paper's. 0: none.",
        least=0,
        most=1,
        panel=EXTRAS,
    )
    delta: float | str = option(
        "0.001",
        "ewgs: how much gradients are scaled: a number, or hessian, from whose trace it is found in every epoch.",
        panel=EXTRAS,
        check=values.delta,
        means=values.delta,
        given=str,
    )
    norms: str = option(
        "again",
        "BatchNorm's statistics in evaluation. again: measured on the calibration images; running: as training left "
        "them.",
        panel=EXTRAS,
        check=values.one_of("--norms", "again", "running"),
    )
    from_scratch: bool = option(
        False, "Start with new weights, of the checkpoint's network or of --model.", panel=SCRATCH
    )
    reg: str = option(
        "none",
        "none, or a regularizer, as in pretrain.",
        panel=SCRATCH,
        check=registry.one_of(registry.REGULARIZERS, "none"),
    )
    reg_weight: float | None = option(None, "Strength. (default: as in pretrain)", least=0, panel=SCRATCH)
    calibration: int | None = option(
        None, "Number of training images on which quantizers start and ranges are set. (default: 512)", least=2
    )
    precision: str = option(
        "auto",
        "float32, bfloat16 (mixed), or auto: bfloat16 on a GPU that has it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    )
    target: str = groups.target()
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        registry.require_own(registry.QAT_METHODS, self.method, self.own_options)
        if self.reg != "none" and not self.from_scratch:
            raise InputError(
                f"--reg {self.reg} belongs to --from-scratch: use it in r2 pretrain, and leave it out here"
            )
        targets.require(self.target, act_bits=values.trained_act_bits(self.act_bits))

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that single methods have, as their entries declare them."""
        return meanings(self, registry.single_options(registry.QAT_METHODS))

    @property
    def suffix(self) -> str:
        """The part of the output's name that says what was done, for example 'w4a8-lsq'."""
        acts = values.trained_act_bits(self.act_bits)
        return f"w{self.weight_bits}{f'a{acts}' if acts else ''}-{self.method}{groups.for_target(self.target)}"


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
