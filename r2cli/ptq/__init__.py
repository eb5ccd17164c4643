"""Post-training quantization: a trained network gets codes without being trained again."""
