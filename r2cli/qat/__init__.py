"""Quantization-aware training: a network learns with its weights and activations on few levels."""
