"""Two lines for every command, which its --help ends in. A test reads them as the command would."""

EXAMPLES = {
    "pretrain": (
        "r2 pretrain --reg margin",
        "r2 pretrain --model resnet20 --data cifar10 --epochs 60 -o resnet20.safetensors",
    ),
    "analyze": ("r2 analyze model.safetensors --bits 4", "r2 analyze before.onnx after.onnx -o report.html"),
    "ptq": (
        "r2 ptq model.safetensors --weight-bits 4 --method brecq --max-drop 1",
        "r2 ptq --model net.py:factory --weights net.pth --data imagefolder:DIR",
    ),
    "qat": (
        "r2 qat model.safetensors --weight-bits 2 --act-bits 4 --epochs 20",
        "r2 qat model.onnx --data images:DIR --loss distill",
    ),
    "palettize": (
        "r2 palettize --bits 2 --dim 2",
        "r2 palettize model.safetensors --method kmeans --bits 4 --keep 'conv1=8'",
    ),
    "export": ("r2 export model.safetensors", "r2 export model.w4a8-none.safetensors --target npu --batch 1"),
    "evaluate": (
        "r2 evaluate model.w4a8-none.onnx --min-accuracy 90",
        "r2 evaluate model.onnx --data imagefolder:DIR --runtime openvino",
    ),
    "compare": (
        "r2 compare model.safetensors model.w4a8-none.safetensors",
        "r2 compare model.onnx model.w4a8-none.safetensors --data images:DIR --sort depth --limit 0",
    ),
    "cost": (
        "r2 cost model.safetensors --widths W8A8,W8A16,float",
        "r2 cost model.safetensors --target ethos-u --widths 8,4,2 -o cycles.csv",
    ),
    "verify": (
        "r2 verify model.w4a8-none.onnx --against model.w4a8-none.safetensors",
        "r2 verify theirs.onnx --against float.onnx --data images:DIR",
    ),
    "run": ("r2 run quickstart", "r2 run mine.toml --jobs 2 --resume"),
    "init": (
        "r2 init net.py:factory --weights net.pth --data imagefolder:DIR",
        "r2 init model.onnx --data images:DIR -o mine.toml",
    ),
    "doctor": ("r2 doctor", "r2 doctor --no-self-test --json"),
    "targets": ("r2 targets", "r2 targets --json"),
}


def told(command: str) -> str:
    """The end of the help of a command."""
    return "Examples:\n\n" + "\n\n".join(EXAMPLES[command])
