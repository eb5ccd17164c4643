"""Where the bytes of an exported file are, and the least that its graph could take.

    python benchmarks/file_size.py model.b2d2-dkm.onnx ... --output benchmarks/file_size.md

Data: codes, tables, scales and biases, the bytes of all initializers but those that layers share. Notes: the metadata
that says how to feed the file and how it was made. Nodes: the graph. Heads: names, shapes and types of the
initializers, with what layers share. The floor is the same
nodes and heads if every name had one letter.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

COLUMNS = ("file", "layers", "bytes", "data", "notes", "nodes", "heads", "floor of nodes and heads")
SHARED = ("shape.", "bytes.", "step.", "code.", "constant.")  # initializers that layers share


def written(messages: Iterable[Any]) -> int:
    """Bytes of messages in a file, each with its tag and its length."""
    return sum(size + 2 + (size > 127) + (size > 16383) for size in (each.ByteSize() for each in messages))


def floor(graph: onnx.GraphProto) -> int:
    """Bytes of the nodes and of the initializers' heads with names of one letter."""
    total = 0
    for given in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(given)
        node.ClearField("name")
        node.input[:], node.output[:] = ["a" if name else "" for name in given.input], ["a"] * len(given.output)
        total += written([node])
    return total + sum(head(each) - len(each.name) + 1 for each in graph.initializer)


def head(given: onnx.TensorProto) -> int:
    """Bytes of an initializer without its data; all of it where layers share it."""
    return written([given]) - (0 if given.name.startswith(SHARED) else len(given.raw_data))


def row(path: Path) -> list[str]:
    file = onnx.load(path)
    graph = file.graph
    data = sum(len(each.raw_data) for each in graph.initializer if not each.name.startswith(SHARED))
    layers = sum(each.name.endswith((".weight.codes", ".weight.low")) for each in graph.initializer)
    parts = (
        written(file.metadata_props),
        written(graph.node),
        sum(map(head, graph.initializer)),
    )
    counts = (layers, path.stat().st_size, data, *parts, floor(graph))
    return [path.name, *(f"{count:,.0f}" for count in counts)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the bytes of exported files are.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(path) for path in arguments.files)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    if arguments.output:
        arguments.output.write_text(f"# Where the bytes of an exported file are\n\n{table}\n")


if __name__ == "__main__":
    main()
