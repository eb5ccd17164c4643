"""The README's picture, from the files of `r2 run recipes/quickstart.toml`.

    python benchmarks/figure.py runs/quickstart docs/figure.png

Left: the weights of one layer, trained without and with the margin regularizer, on the same axes. Right: top-1 of the
ONNX file at 8 to 2 bits, from the recipe's results.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from safetensors.torch import load_file

LAYER = "blocks.11.pointwise.weight"
COLOURS = {"none": "#c44e52", "margin": "#2a6f97"}
NAMES = {"none": "no regularizer", "margin": "margin"}


def main(folder: Path, output: Path) -> None:
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (weights, accuracy) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for reg, colour in COLOURS.items():
        w = load_file(folder / f"{reg}.safetensors")[LAYER].flatten()
        w = w / w.std()
        weights.hist(w.numpy(), bins=120, range=(-8, 8), log=True, color=colour, alpha=0.6, label=NAMES[reg])
        edge = float(w.abs().max())
        for side in (-edge, edge):
            weights.axvline(side, color=colour, linestyle=":", linewidth=1)
    weights.set(xlabel=f"{LAYER} / standard deviation", ylabel="weights (log)")
    weights.legend(frameon=False)
    record = json.loads((folder / "results.json").read_text())
    for reg, colour in COLOURS.items():
        points = [entry["report"] for name, entry in record.items() if name.startswith(f"{reg}.w")]
        points.sort(key=lambda report: -report["options"]["weight_bits"])
        bits = [str(report["options"]["weight_bits"]) for report in points]
        accuracy.plot(bits, [report["top1"] for report in points], "o-", color=colour, label=NAMES[reg])
        accuracy.axhline(points[0]["float_top1"], color=colour, linestyle=":", linewidth=1)
    accuracy.set(xlabel="bits of the weights (dotted: float)", ylabel="top-1 of the ONNX file, %", ylim=(0, 102))
    accuracy.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
