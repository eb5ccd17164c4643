"""Where the bytes of an exported file are, and the least that its graph could take.

    python benchmarks/file_size.py model.b2d2-dkm.onnx ... --output benchmarks/file_size.md

Data: codes, tables, scales and biases, the bytes of all initializers but those that layers share. Notes: the metadata
that says how to feed the file and how it was made. Functions: what layers repeat. Nodes: the calls of functions, and
what is there once. Heads: names, shapes and types of the initializers, with what layers share. The floor is the same
nodes and heads if every name had one letter and no call said which layer it is.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from r2cli.deploy import onnx_text

COLUMNS = ("file", "layers", "bytes", "data", "notes", "functions", "nodes", "heads", "floor of nodes and heads")
LIMITS = ("data + 2 % + 3 KB", "and 150 bytes a layer")
SHARED = tuple(onnx_text.SHARED.values())


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
    codes = [each for each in graph.initializer if onnx_text.letter(each.name) in ("c", "l")]
    layers = sum(each.data_type != onnx.TensorProto.INT32 for each in codes)  # a last bias has codes, too
    parts = (
        written(file.metadata_props),
        written(file.functions),
        written(graph.node),
        sum(map(head, graph.initializer)),
    )
    limit = 1.02 * data + 3072
    counts = (layers, path.stat().st_size, data, *parts, floor(graph), limit, limit + 150 * layers)
    return [path.name, *(f"{count:,.0f}" for count in counts)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the bytes of exported files are.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    lines = [(*COLUMNS, *LIMITS), ["---"] * len(COLUMNS + LIMITS), *(row(path) for path in arguments.files)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    if arguments.output:
        arguments.output.write_text(f"# Where the bytes of an exported file are\n\n{table}\n")


if __name__ == "__main__":
    main()
