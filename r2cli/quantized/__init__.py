"""Quantized values: grids and palettes, codes and how they are packed, and the operations that all methods share."""
