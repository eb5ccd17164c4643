"""The configs of what trains and compresses: `PretrainConfig`, `PtqConfig`, `QatConfig`, `PalettizeConfig`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.config import groups, values
from r2cli.config.option import FOREIGN, Config, meanings, option
from r2cli.errors import InputError

__all__ = ["FOREIGN", "PalettizeConfig", "PretrainConfig", "PtqConfig", "QatConfig"]

REGULARIZATION, EXTRAS, SCRATCH = "Regularization", "What comes to the training", "From scratch"
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
        "Strength; of clip, how many deviations. (default: 0.01, for small images what measured best; clip 2)",
        panel=REGULARIZATION,
        least=0,
    )
    reg_form: str = option(
        "stable",
        "stable, or paper: equations 1 to 3 to the letter.",
        panel=REGULARIZATION,
        check=values.one_of("--reg-form", "stable", "paper"),
    )
    reg_dim: int = option(1, "Vector length of a later palette.", panel=REGULARIZATION, least=1, most=8)
    reg_lr: float | None = option(
        None,
        "Rate of margin's M and soft-minmax's alpha; with adamw, of what the regularizer does to weights too. "
        "(default: --lr; paper form 0.01; adamw 0.1)",
        panel=REGULARIZATION,
        least=0,
    )
    margin_k: int = option(1, "Margin: divide the hinge by K (1: the paper's).", panel=REGULARIZATION, least=1)
    epochs: int = option(40, "Passes over the data.", least=1)
    batch_size: int = option(64, "Images a step.", least=2)
    optimizer: str | None = groups.optimizer()
    lr: float | None = option(
        None,
        "Peak learning rate; a cosine falls from it to 0. (default: 0.1 for each 64 of --batch-size; adamw 1e-4)",
        least=0,
    )
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1)
    weight_decay: float = option(4e-5, "L2 on weights; 10x L2 is 4e-4.", least=0)
    warmup: float = option(0.05, "Share of the steps that the rate rises.", least=0, most=1)
    label_smoothing: float = option(0.0, "0 to 1.", least=0, most=1)
    clip_grad: float | None = option(None, "Most length of the gradient, all weights together.", least=0)
    ema: float | None = option(None, "Keep a running average of the weights, 0.999 for example.", least=0, most=1)
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
        None, "8 to 1; 1 is two levels without a zero. (default: 8)", check=values.bits("--weight-bits")
    )
    target_bits: float | None = option(
        None, "Mixed precision: bits a weight on average, as 3.2.", check=values.bits("--target-bits")
    )
    target_bytes: int | None = option(None, "Mixed precision: bytes of all codes and scales.", least=1)
    sensitivity: str = option(
        "hessian",
        "What mixed precision goes by: hessian, or sqnr, which needs no data.",
        check=values.one_of("--sensitivity", "hessian", "sqnr"),
    )
    act_bits: int | str = option("8", "8 to 4, or none to leave activations float.", check=values.act_bits, given=str)
    method: str = option(
        "none",
        f"{registry.described(registry.PTQ_METHODS)}.",
        check=registry.one_of(registry.PTQ_METHODS),
    )
    granularity: str | None = option(
        None,
        "channel; tensor: one grid after folding BatchNorm; unfolded: one grid on the weights as trained, "
        "with BatchNorm in per-channel scales. (default: channel; auto tries unfolded too)",
        check=values.one_of("--granularity", "channel", "tensor", "unfolded"),
    )
    weight_range: str | None = option(
        None,
        "Of weights: minmax, percentile[:99.99] or mse. (default: minmax; brecq's: mse to 4 bits, and mixed)",
        check=values.range_rule("--weight-range", *values.WEIGHT_RANGES),
    )
    symmetric: bool = option(
        True, "Weight grids with zero point 0, or with one of their own.", "--symmetric/--asymmetric"
    )
    act_range: str | None = groups.act_range()
    keep: Keep = groups.keep("PATTERN=BITS: other weight bits for some layers; repeatable.", values.keep)
    embeddings: bool = groups.embeddings()
    parts: str | Sequence[str] | None = option(
        None,
        "What of dfq comes before rounding: equalize,absorb,correct or some, or none.",
        check=values.parts,
        given=str | None,
    )
    relu6: str = option(
        "clip",
        "dfq: clip: the same function, a bound for each channel; relu: ReLU in its place.",
        check=values.one_of("--relu6", "clip", "relu"),
    )
    calibration: int | None = option(
        None,
        "Training images that set activation ranges; 0: none, BatchNorm's statistics do. "
        "(default: 512; 0 for dfq without --data)",
        least=0,
    )
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
            raise InputError(f"{' and '.join(given)} are two wishes: give one of them")
        if self.parts is not None and registry.get(registry.PTQ_METHODS, self.method).chooses:
            raise InputError(f"--method {self.method} tries which --parts help: leave one of the two out")
        if self.calibration == 0 and self.act_range is not None:
            raise InputError(
                f"--act-range {self.act_range} looks at images: give --calibration, or leave it to the BatchNorms"
            )

    @property
    def suffix(self) -> str:
        """How the name of the output tells what was done: 'w4a8-none-unfolded'."""
        wanted = f"{self.weight_bits or 8}"
        if self.target_bits:
            wanted = f"{self.target_bits:g}"
        elif self.target_bytes:
            wanted = f"{self.target_bytes}B"
        acts = values.act_bits(self.act_bits)
        grid = "" if self.granularity in (None, "channel") else f"-{self.granularity}"
        return f"w{wanted}{f'a{acts}' if acts else ''}-{self.method}{grid}"


@dataclass(frozen=True)
class QatConfig(Config):
    """Train a network as it will be deployed, with weights and activations on few levels."""

    weight_bits: int = option(4, "lsq 8 to 2, the others 7 to 1.", check=values.bits("--weight-bits"))
    act_bits: int | str = option(
        "8", "8 to 1, or none to leave activations float.", check=values.trained_act_bits, given=str
    )
    method: str = option(
        "lsq",
        f"{registry.described(registry.QAT_METHODS)}.",
        check=registry.one_of(registry.QAT_METHODS),
    )
    keep: Keep = groups.keep(
        "PATTERN=BITS: other weight bits for some layers, and inputs of as many; repeatable.", values.keep
    )
    activations: str = option(
        "outputs",
        "outputs: all that computes is rounded, 8 bits where sums read it; inputs: what layers read, as in the papers.",
        check=values.one_of("--activations", "outputs", "inputs"),
    )
    start: str = option(
        "fitted",
        "Where steps and ranges begin: fitted, where least is lost, or as in the paper: paper.",
        check=values.one_of("--start", "fitted", "paper"),
    )
    epochs: int = option(20, "Passes over the data.", least=1)
    batch_size: int = option(64, "Images a step.", least=2)
    images: int | None = option(None, "Train on so many of the images. (default: all)", least=2)
    lr: float | None = option(None, "Peak learning rate; a cosine falls from it to 0. (default: 0.05)", least=0)
    quantizer_lr: float | None = option(None, "Of steps and ranges. (default: --lr; ewgs, by Adam, 0.001)", least=0)
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1)
    clip_grad: float | None = option(
        None,
        "Most length of the gradient, all weights together, 0: any; a channel gone dead has a huge one. (default: 1)",
        least=0,
    )
    weight_decay: float | None = option(
        None, "L2 on weights. (default: 1e-4; half of it at 3 bits, a quarter below)", least=0
    )
    distill: float = option(0.0, "Weight of the distance to the float network's predictions.", least=0, panel=EXTRAS)
    progressive: bool = option(False, "Begin at 8 bits, go on at 4, end at those wanted.", panel=EXTRAS)
    bin_reg: float = option(
        0.0, "lsq: draw weights to their levels in the second half, so strongly.", least=0, panel=EXTRAS
    )
    delta: float | str = option(
        "0.001",
        "ewgs: a number, or hessian: from its trace, every epoch.",
        panel=EXTRAS,
        check=values.delta,
        means=values.delta,
        given=str,
    )
    norms: str = option(
        "again",
        "BatchNorm's statistics before each evaluation: again, over the calibration images; or running, as "
        "training left them.",
        panel=EXTRAS,
        check=values.one_of("--norms", "again", "running"),
    )
    from_scratch: bool = option(False, "Fresh weights, of the checkpoint's network or of --model.", panel=SCRATCH)
    reg: str = option(
        "none",
        "none, or a regularizer, as in pretrain.",
        panel=SCRATCH,
        check=registry.one_of(registry.REGULARIZERS, "none"),
    )
    reg_weight: float | None = option(None, "Strength. (default: as in pretrain)", least=0, panel=SCRATCH)
    calibration: int | None = option(
        None, "Training images that quantizers start on, and ranges are set by. (default: 512)", least=2
    )
    precision: str = option(
        "auto",
        "Of training: float32, bfloat16 (mixed), or auto: bfloat16 on a GPU with it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    )
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        registry.require_own(registry.QAT_METHODS, self.method, self.own_options)
        if self.reg != "none" and not self.from_scratch:
            raise InputError(f"--reg {self.reg} belongs to --from-scratch: pretrain with it, and fine-tune without")

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that single methods have, as their entries declare them."""
        return meanings(self, registry.single_options(registry.QAT_METHODS))

    @property
    def suffix(self) -> str:
        """How the name of the output tells what was done: 'w4a8-lsq'."""
        acts = values.trained_act_bits(self.act_bits)
        return f"w{self.weight_bits}{f'a{acts}' if acts else ''}-{self.method}"


@dataclass(frozen=True)
class PalettizeConfig(Config):
    """Compress weights to indices into small tables of centroids."""

    bits: int = option(4, "2**BITS centroids a table, 1 to 8.", check=values.bits("--bits"))
    dim: int = option(
        1,
        "Values of a centroid, 1, 2, 4 or 8: BITS / DIM bits a weight.",
        check=values.number_of("--dim", 1, 2, 4, 8),
    )
    method: str | None = option(
        None,
        f"{registry.described(registry.PALETTE_METHODS)}. (default: dkm; kmeans for a file without a network of r2's)",
        check=registry.one_of(registry.PALETTE_METHODS),
    )
    group_size: int | None = option(
        None,
        "Output channels that share a table; a layer that it does not divide has one. (default: all)",
        least=1,
    )
    lut_bits: int = option(
        8, "8: tables of int8 with a scale; 32: of float32.", check=values.number_of("--lut-bits", 8, 32)
    )
    act_bits: int | str | None = option(
        None,
        "8 to 4, or none to leave activations float. (default: 8; none with --lut-bits 32)",
        check=values.act_bits,
        given=str | None,
    )
    act_range: str | None = groups.act_range()
    keep: Mapping[str, object] | Sequence[str] = groups.keep(
        "PATTERN=BITS or PATTERN=BITSxDIM: another palette for some layers; repeatable.", values.keep_forms
    )
    embeddings: bool = groups.embeddings()
    weigh: str = option(
        "none",
        "kmeans: none, or fisher: by squared gradients on training images.",
        check=values.one_of("--weigh", "none", "fisher"),
    )
    epochs: int = option(8, "Passes over the data.", least=1, panel=PALETTE_TRAINING)
    hard_epochs: int = option(2, "Of them, at the end, with hard assignments.", least=0, panel=PALETTE_TRAINING)
    temperature: float = option(
        0.5,
        "dkm: of the first epoch, as a share of each layer's mean squared distance; it falls to a tenth.",
        least=0.001,
        panel=PALETTE_TRAINING,
    )
    iterations: int = option(3, "dkm: k-means iterations a step.", least=1, most=20, panel=PALETTE_TRAINING)
    batch_size: int = option(64, "Images a step.", least=2, panel=PALETTE_TRAINING)
    optimizer: str | None = groups.optimizer()
    lr: float | None = option(None, "Peak learning rate. (default: 0.02; adamw 1e-4)", least=0, panel=PALETTE_TRAINING)
    lut_lr: float | None = option(
        None, "shared: peak rate of the centroids. (default: 0.0001)", least=0, panel=PALETTE_TRAINING
    )
    momentum: float = option(0.9, "Nesterov momentum.", least=0, most=1, panel=PALETTE_TRAINING)
    clip_grad: float | None = option(
        None,
        "Most length of the gradient, all weights together. 0: any. (default: dkm's is 1; 5 at 1 and 2 bits)",
        least=0,
        panel=PALETTE_TRAINING,
    )
    clip_ratio: float | None = option(
        None,
        "Most length of a layer's gradient, as a share of its weights'. 0: any. (default: dkm's is 0.3)",
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
        "Training images for BatchNorm's statistics and activation ranges; 0: none. (default: 512)",
        least=0,
    )
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_bits and self.lut_bits != 8:
            raise InputError(
                f"--act-bits {self.activation_bits} needs integer weights: give --lut-bits 8, or --act-bits none"
            )

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that single methods have, as their entries declare them."""
        return meanings(self, registry.single_options(registry.PALETTE_METHODS))

    @property
    def activation_bits(self) -> int | None:
        """Bits of activations; None where they stay float."""
        if self.act_bits is None:
            return 8 if self.lut_bits == 8 else None
        return values.act_bits(self.act_bits)

    def suffix(self, method: str) -> str:
        """How the name of the output tells what was done: 'b2d2-dkm'."""
        return f"b{self.bits}d{self.dim}{f'g{self.group_size}' if self.group_size else ''}-{method}"
