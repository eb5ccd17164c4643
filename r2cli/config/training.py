"""The options of the commands that train: `pretrain` and `qat`."""

from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.config import groups, targets, values
from r2cli.config.option import Config, meanings, option
from r2cli.errors import InputError

REGULARIZATION, EXTRAS, SCRATCH = "Regularization", "Additions to the training", "From scratch"


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
    reg_dim: int = option(1, "The --dim of a later palette.", panel=REGULARIZATION, least=1, most=8)
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
    clip_grad: float | None = option(
        None, "The greatest norm of the gradient of all weights together. (default: no limit)", least=0
    )
    ema: float | None = option(
        None,
        "Keep a running average of the weights with this decay, for example 0.999. (default: none)",
        least=0,
        most=1,
    )
    precision: str = option(
        "auto",
        "float32, bfloat16 (mixed), or auto: bfloat16 on a GPU that has it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    )
    compile: bool = option(False, "Compile the network (torch.compile).")
    seed: int = groups.seed()
    device: str = groups.device()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reg != "margin" and self.margin_k != 1:
            raise InputError(f"--margin-k belongs to --reg margin, and {self.reg} has nothing like it: leave it out")


@dataclass(frozen=True)
class QatConfig(Config):
    """Train a network as it will be deployed, with weights and activations on few levels."""

    weight_bits: int = option(
        4, "Bits of weights: 8 to 2 with lsq, 7 to 1 with the others.", check=values.bits("--weight-bits")
    )
    act_bits: int | str = option(
        "8", "Bits of activations, 8 to 1, 16, or none to leave them float.", check=values.trained_act_bits, given=str
    )
    method: str = option(
        "lsq",
        f"How the levels are trained. {registry.described(registry.QAT_METHODS)}.",
        check=registry.one_of(registry.QAT_METHODS),
    )
    keep: groups.Keep = groups.keep(
        "PATTERN=BITS for some layers: 4 (weights, and at least as many for what they read), W4A8, W8A16 or float; "
        "repeatable.",
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
        0.0,
        "lsq: how strongly weights between two levels are pulled to the nearer one; rises from 0 to this.",
        least=0,
        panel=EXTRAS,
    )
    freeze: float = option(
        0.0,
        "lsq: freeze weights that turn back in more than this share of steps, towards the end; paper: 0.01. 0: none.",
        least=0,
        most=1,
        panel=EXTRAS,
    )
    delta: float | str = option(
        "0.001",
        "ewgs: how much gradients are scaled: a number, or hessian: found from its trace in each epoch.",
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
        groups.require_forms(self, least=1, grids=False)

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that single methods have, as their entries declare them."""
        return meanings(self, registry.single_options(registry.QAT_METHODS))

    @property
    def suffix(self) -> str:
        """The part of the output's name that says what was done, for example 'w4a8-lsq'."""
        acts = values.trained_act_bits(self.act_bits)
        return f"w{self.weight_bits}{f'a{acts}' if acts else ''}-{self.method}{groups.for_target(self.target)}"
