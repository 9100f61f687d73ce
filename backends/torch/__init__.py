"""PyTorch itself: `package.py` compiles a program by AOTInductor, `run.py` runs it."""

from slrc.backends.torch.backend import TorchInductor

__all__ = ["TorchInductor"]
