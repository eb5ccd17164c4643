"""Storage: checkpoints, and tensors in files that r2 did not write."""
