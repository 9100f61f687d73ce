"""ONNX Runtime: `backend.py` writes `model.onnx`, `run.py` runs it."""

from slrc.backends.ort.backend import OnnxRuntime

__all__ = ["OnnxRuntime"]
