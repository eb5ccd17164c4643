"""r2cli: from a PyTorch network to a deployable integer ONNX model."""

__version__ = "0.1.0"
