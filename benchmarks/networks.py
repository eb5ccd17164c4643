"""How wide are the doors? A hundred networks of torchvision and timm, read, quantized, written and proved.

Each network has random weights; its BatchNorms have seen noise, each image of a contrast and a colour of its own, and
their shifts are 1 instead of 0: a deep random network is chaotic otherwise (see onnx_speed.py). Layer scales of 1e-6
are drawn anew so that their blocks count. The forms are W8A8, and W4A8 per channel (`r2cli.quantize`, nearest
rounding); for the first networks of each list also two steps of training (`r2cli.finetune`, W4A8) and palettes
(`r2cli.palettize`, k-means, 4 bits). Each file is proved as `r2 ptq` proves it. Labels are the float network's answers.

    python benchmarks/networks.py --work-dir networks --output benchmarks/networks.md

One JSON file a network in the work directory: a run that was stopped goes on where it was, and `--forms W8A8` does that
form of every network first. Nothing is hidden: a network that is refused, or fails its proof, is a row that says so.
"""

import argparse
import json
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime
import torch
from given_images import data_of
from onnx_speed import machine, table
from torch import Tensor, nn

import r2cli
from r2cli import __version__, models
from r2cli.calibration import deployed
from r2cli.deploy import runtime
from r2cli.deploy.verify import Proof
from r2cli.errors import R2Error
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

# One of each family of torchvision's classifiers.
TORCHVISION = (
    "mobilenet_v3_small mobilenet_v2 resnet18 efficientnet_b0 mnasnet0_5 shufflenet_v2_x0_5 squeezenet1_1 "
    "regnet_y_400mf regnet_x_400mf densenet121 googlenet inception_v3 resnext50_32x4d wide_resnet50_2 vgg11 vgg11_bn "
    "alexnet convnext_tiny efficientnet_v2_s mobilenet_v3_large vit_b_32 swin_t swin_v2_t maxvit_t resnet50"
)
# Mobile networks first, then the families that the others of timm belong to.
TIMM = (
    "mobilenetv4_conv_small mobilenetv3_small_050 efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnetv2_b0 "
    "mnasnet_small fbnetc_100 ghostnet_050 ghostnetv2_100 repvgg_a0 mobileone_s0 lcnet_050 tinynet_e hardcorenas_a "
    "mixnet_s rexnet_100 regnetx_002 regnety_002 resnet18 resnext26ts res2net50_26w_4s seresnet18 dla46_c "
    "hrnet_w18_small densenet121 ese_vovnet19b_dw cspresnet50 selecsls42b eca_nfnet_l0 fastvit_t8 mobilevit_xxs "
    "mobilevitv2_050 efficientvit_b0 efficientvit_m0 efficientformer_l1 edgenext_xx_small levit_128s convnext_atto "
    "convnextv2_atto poolformer_s12 mixer_s32_224 resmlp_12_224 deit_tiny_patch16_224 vit_tiny_patch16_224 "
    "swin_tiny_patch4_window7_224 maxvit_tiny_rw_224 coatnet_nano_rw_224 tiny_vit_5m_224 starnet_s1 repghostnet_050 "
    "xception41 ghostnetv3_050 efficientnet_es fbnetv3_b mobilenetv4_hybrid_medium mobilenetv3_large_100 mixnet_m "
    "tf_mixnet_s pvt_v2_b0 repvit_m0_9 fasternet_t0 inception_next_atto gernet_s semnasnet_075 spnasnet_100 "
    "cspdarknet53 test_vit test_resnet test_efficientnet test_byobnet test_convnext test_nfnet test_mambaout "
    "test_vit_relpos resnetv2_50"
)
NETWORKS = (*TORCHVISION.split(), *(f"timm:{name}" for name in TIMM.split()))
EACH_ROAD = (*NETWORKS[:10], *NETWORKS[25:40])  # the 25 that are trained and given palettes too
CLASSES, BATCH = 100, 8
HEAD = [
    *("network", "pixels", "W8A8", "W4A8", "qat", "palettes", "layers", "weights' bytes on integers"),
    *("BatchNorms left", "float operations", "integer nodes", "dB to torch", "dB to float", "s W8A8", "s all"),
]
INTEGER = ("QLinear", "QGemm", "MatMulInteger")
KEPT = ("nodes", "float_operations", "float_weights", "integer_share", "sqnr_db", "float_sqnr_db", "bytes")
QAT = r2cli.QatConfig(weight_bits=4, act_bits=8, epochs=1, batch_size=BATCH, device="cpu")
PALETTES = r2cli.PalettizeConfig(method="kmeans", bits=4, act_bits="8", device="cpu")
ROADS: dict[str, Callable[..., Any]] = {
    "W8A8": lambda made, source: r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=8, device="cpu")),
    "W4A8": lambda made, source: r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=4, device="cpu")),
    "qat": lambda made, source: r2cli.finetune(made, source, QAT),
    "palettes": lambda made, source: r2cli.palettize(made, source, PALETTES),
}
FORMS = tuple(ROADS)


def noise(batches: int, seed: int, size: int) -> list[Tensor]:
    """`batches` batches of normal noise, each image of its own contrast and colour: float32 (BATCH, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        pixels = torch.randn(BATCH, 3, size, size, generator=generator)
        contrast = 2 * torch.rand(BATCH, 3, 1, 1, generator=generator)
        return pixels * contrast + torch.randn(BATCH, 3, 1, 1, generator=generator)

    return [batch() for _ in range(batches)]


def sizes(name: str, size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Keywords and sizes of images to try: as it is, told the size, and at the network's own size."""
    yield {}, size
    yield {"img_size" if name.startswith("timm:") else "image_size": size}, size
    yield {}, 224
    yield {}, 299


def network(name: str, size: int) -> Checkpoint:
    """A random network whose BatchNorms have seen noise, for images of `size` or of the only one that it takes."""
    for args, pixels in sizes(name, size):
        try:
            torch.manual_seed(0)
            spec = ModelSpec(name, CLASSES, args=args)
            model = models.build(spec).train()
            with torch.no_grad():
                model(noise(1, 1, pixels)[0])
            break
        except Exception as error:  # whatever a network raises that wants another size
            last = error
    else:
        raise last
    for key, parameter in model.named_parameters():
        if key.endswith(("layer_scale", "gamma")) and float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, 0, 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.bias is not None:
            nn.init.ones_(module.bias)
            module.momentum = None  # average over the batches
    if isinstance(getattr(model, "heads", None), nn.Sequential):
        # torchvision's is zero: logits that say nothing.
        nn.init.normal_(list(model.get_submodule("heads").parameters())[-2], 0, 0.02)
    with torch.no_grad():
        for images in noise(4, 1, pixels):
            model(images)
    state = {key: tensor.contiguous() for key, tensor in model.eval().state_dict().items()}
    spec_of_input = InputSpec(3, pixels, pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Checkpoint(spec, spec_of_input, tuple(map(str, range(CLASSES))), state)


def proved(result: Any, source: Any) -> Proof:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        r2cli.export(result, path)
        return r2cli.verify(path, result, source, timed=False)


def tried(work: Callable[[], Proof]) -> tuple[str, dict[str, Any]]:
    """'passed', or what failed or was refused, in one line; and the measures of the proof."""
    try:
        proof = work()
    except Exception as error:  # a row says what became of it
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        known = isinstance(error, R2Error)
        return told if known else f"{told} ({Path(place.filename).name}:{place.lineno})", {}
    failed = [f"{check.name}: {check.detail[:200]}" for check in proof.checks if not check.passed]
    return f"FAILED {'; '.join(failed)}" if failed else "passed", dict(proof.measures)


def row(name: str, size: int, forms: Sequence[str]) -> dict[str, Any]:
    """One network in these of its forms, `FORMS`."""
    started = perf_counter()
    try:
        made = network(name, size)
    except Exception as error:  # the network itself, without any of ours
        return {"network": name, "size": size, "forms": {"W8A8": f"cannot be built: {error}"}, "seconds": 0}
    float_model = deployed.network(made)
    with torch.inference_mode():
        test = [(images, float_model(images).argmax(1)) for images in noise(2, 3, made.input.size)]
    assert isinstance(made.input, InputSpec), "a network of images"
    source = data_of(made.input, made.class_names, noise(2, 2, made.input.size), test)
    verdicts: dict[str, str] = {}
    found: dict[str, Any] = {
        "network": name,
        "size": made.input.size,
        "forms": verdicts,
        "layers": sum(isinstance(m, nn.Linear | nn.modules.conv._ConvNd) for m in float_model.modules()),
    }
    for form in forms:
        begun = perf_counter()
        road = ROADS[form]
        verdicts[form], measures = tried(lambda road=road: proved(road(made, source), source))  # type: ignore[misc]
        if form == "W8A8":
            found |= {key: measures.get(key) for key in KEPT} | {"seconds_w8a8": round(perf_counter() - begun, 1)}
    return found | {"seconds": round(perf_counter() - started, 1)}


def forms_of(name: str) -> tuple[str, ...]:
    """The forms that a network is tried in."""
    return FORMS if name in EACH_ROAD else FORMS[:2]


def went_on(file: Path, name: str, size: int, forms: Sequence[str]) -> dict[str, Any]:
    """The network's row with `forms`: those that its `file` lacks are done, and written there."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"forms": {}, "seconds": 0}
    wanted = [form for form in forms_of(name) if form in forms and form not in known["forms"]]
    if not wanted or known["forms"].get("W8A8", "").startswith("cannot be built"):
        return known
    found = row(name, size, wanted)
    both = {"forms": known["forms"] | found["forms"], "seconds": round(known["seconds"] + found["seconds"], 1)}
    found = known | found | both
    file.write_text(json.dumps(found))
    print(" | ".join(cells(found)), flush=True)
    return found


def cells(one: dict[str, Any]) -> list[str]:
    """A row of the table."""
    nodes = one.get("nodes") or {}
    kinds = Counter(each["kind"] for each in one.get("float_operations") or ())
    share, sqnr, away = (one.get(key) for key in ("integer_share", "sqnr_db", "float_sqnr_db"))
    return [
        one["network"],
        str(one["size"]),
        *(one["forms"].get(form, "") for form in FORMS),
        str(one.get("layers", "")),
        "" if share is None else f"{share:.1f} %",
        str(nodes.get("BatchNormalization", 0)) if nodes else "",
        ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        str(sum(count for op, count in nodes.items() if op.startswith(INTEGER))) if nodes else "",
        "" if sqnr is None else f"{sqnr:.0f}",
        "" if away is None else f"{away:.1f}",
        str(one.get("seconds_w8a8", "")),
        str(one["seconds"]),
    ]


def summary(done: list[dict[str, Any]]) -> str:
    """What the goal asks for, counted."""
    read = [one for one in done if one.get("nodes") or one["forms"]["W8A8"].startswith("FAILED")]
    whole = [one for one in read if (one.get("integer_share") or 0) > 99.9]
    forms = {form: [one["forms"][form] for one in done if form in one["forms"]] for form in FORMS}
    counted = ", ".join(f"{form} {found.count('passed')} of {len(found)}" for form, found in forms.items() if found)
    return (
        f"{len(read)} of {len(done)} networks are read; in {len(whole)} more than 99.9 % of the weights' bytes are on "
        f"integers at W8A8. Proofs that pass: {counted}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A hundred networks, quantized, written and proved.")
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=64, help="pixels of the images, where a network takes any")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="only these, of those that are left")
    parser.add_argument("--work-dir", type=Path, default=Path("networks"), help="a JSON file for every network")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    done = []
    for name in arguments.networks:
        file = arguments.work_dir / f"{name.replace(':', '_')}.json"
        done.append(went_on(file, name, arguments.size, arguments.forms))
    text = "\n\n".join(
        [
            f"# {len(done)} networks from float to a proved integer file",
            f"`python benchmarks/networks.py`; {machine()} ({runtime.cpu()}); r2cli {__version__}, torch "
            f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}; seeds 0 to 3 in the script.",
            summary(done),
            "`dB to torch`: logits of the W8A8 file in ONNX Runtime against the quantized network in torch; `dB to "
            "float`: against the float one. Weights are random: they show the path, not the accuracy. `s W8A8`: "
            "reading, quantizing, writing and proving at W8A8.",
            table(HEAD, [cells(one) for one in done]),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
