"""TensorRT and TensorRT-RTX: `precision.py` sets the types, `build.py` builds, `run.py` runs."""

from slrc.backends.tensorrt.backend import TensorRT, TensorRTRTX

__all__ = ["TensorRT", "TensorRTRTX"]
