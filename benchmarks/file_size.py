"""Where the bytes of an exported file are, and the least that its graph could take.

    python benchmarks/file_size.py model.b2d2-dkm.onnx ... --output benchmarks/file_size.md

Data: codes, tables, scales and biases, the bytes of all initializers but those of the tables and shapes that layers
share. Notes: the metadata that says how to feed the file and how it was made. Text is all the rest. The floor is the
text of the same nodes and initializers in standard operators if every name had one letter.
"""

import argparse
from pathlib import Path

import onnx

from r2cli import onnx_text

COLUMNS = ("file", "bytes", "data", "notes", "text", "nodes", "text a node", "floor of the text", "data + 2 % + 3 KB")
SHARED = tuple(onnx_text.SHARED.values())


def floor(graph: onnx.GraphProto) -> int:
    """Bytes of the nodes and of the initializers' heads with names of one letter, and of what they share."""
    total = 0
    for given in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(given)
        node.input[:], node.output[:] = ["a" if name else "" for name in given.input], ["a"] * len(given.output)
        total += node.ByteSize() + 2
    for given in graph.initializer:
        held = len(given.raw_data)
        total += given.ByteSize() - len(given.name) + 1 + 2 - (0 if given.name.startswith(SHARED) else held)
    return total


def row(path: Path) -> list[str]:
    file = onnx.load(path)
    size = path.stat().st_size
    data = sum(len(each.raw_data) for each in file.graph.initializer if not each.name.startswith(SHARED))
    notes = sum(entry.ByteSize() + 3 for entry in file.metadata_props)
    text, nodes = size - data - notes, len(file.graph.node)
    counts = (size, data, notes, text, nodes, text / nodes, floor(file.graph), 1.02 * data + 3072)
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
