"""How a MODEL argument of the command line becomes a workload: from a file, a module, torchvision or timm."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from slrc.errors import SlrcError, WorkloadError
from slrc.workload import Workload, described, user_error

USUAL_IMAGE = (3, 224, 224)
CLIP = 16
"""Frames of a video."""


def load_workload(spec: str) -> Workload:
    """Return the workload that MODEL names.

    Args:
        spec: a Python file with a function `workload()`, `package.module:function`, `torchvision:NAME` or `timm:NAME`.

    Raises:
        WorkloadError: it cannot be found or loaded, or what it returns is no workload.
    """
    source, _, name = spec.partition(":")
    if source in ("torchvision", "timm") and name:
        return _zoo_workload(source, name)
    if spec.endswith(".py") or ".py:" in spec:
        return _call(_load_file(Path(source)), name or "workload", source)
    if name:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise WorkloadError(
                f"module `{source}` cannot be imported: {error}",
                hint="run slrc where `python -c 'import …'` works",
            ) from error
        except Exception as error:
            raise user_error(f"module `{source}`", error) from error
        return _call(module, name, source)
    raise WorkloadError(
        f"cannot tell what model `{spec}` is",
        hint="give a file `model.py`, `package.module:function`, `torchvision:resnet50` or `timm:NAME`; "
        "`slrc init model.py` writes a file to start from",
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise WorkloadError(f"`{path}` does not exist", hint=f"`slrc init {path}` writes a workload to start from")
    sys.path.insert(0, str(path.resolve().parent))
    taken = sys.modules.get(path.stem)
    if taken is None or getattr(taken, "__file__", None) == str(path):
        name = path.stem
    else:  # a file named like a library must not hide it
        name = f"slrc_workload_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except SlrcError:
        raise
    except Exception as error:
        raise user_error(f"`{path}`", error) from error
    return module


def _call(module: ModuleType, name: str, source: str) -> Workload:
    function = getattr(module, name, None)
    if not callable(function):
        raise WorkloadError(
            f"`{source}` has no function `{name}`",
            hint=f"define `def {name}() -> slrc.Workload`, or name the function that makes one: `MODEL:function`",
        )
    if any(
        p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD
        for p in inspect.signature(function).parameters.values()
    ):
        raise WorkloadError(f"`{name}` in `{source}` must take no arguments")
    try:
        workload = function()
    except SlrcError:
        raise
    except Exception as error:
        raise user_error(f"`{name}()` in `{source}`", error) from error
    if not isinstance(workload, Workload):
        raise WorkloadError(f"`{name}()` in `{source}` must return a slrc.Workload, got {described(workload)}")
    if workload.name == "model":
        workload.name = Path(source).stem if name == "workload" else name
    return workload


def _zoo_workload(source: str, name: str) -> Workload:
    """A model of torchvision or timm, with pretrained weights where they can be had."""
    name, at, weights = name.partition("@")
    if at and weights != "random":
        raise WorkloadError(
            f"unknown weights `@{weights}` of `{source}:{name}`",
            hint=f"give `{source}:{name}` for pretrained weights, `{source}:{name}@random` for random ones",
        )
    try:
        library = importlib.import_module("torchvision.models" if source == "torchvision" else "timm")
    except ImportError:
        raise WorkloadError(f"`{source}` is not installed", hint="pip install 'slrc[zoo]'") from None
    names = library.list_models()
    if name not in names and not (source == "timm" and library.is_model(name)):  # a name with a tag, `vit.augreg`
        close = [n for n in names if n.startswith(name[:6])][:5]
        raise WorkloadError(
            f"`{source}` has no model `{name}`",
            hint=f"perhaps {', '.join(close)}" if close else f"see the models of {source}",
        )
    model = None if at else _make_zoo_model(library, source, name, pretrained=True)
    notes = []
    if model is None:
        model = _make_zoo_model(library, source, name, pretrained=False)
        if not at:
            notes.append(f"no pretrained weights for {name} could be fetched: its weights are random")
    assert model is not None
    shape = _timm_shape(library, name) if source == "timm" else _torchvision_shape(library, name, model)
    if shape is None:
        shape = USUAL_IMAGE
        notes.append(f"{source} does not say what size of images {name} takes: its input is {shape}")
    return Workload(model=model, example_inputs=(torch.randn(1, *shape),), name=name, warnings=notes)


def _make_zoo_model(library: ModuleType, source: str, name: str, *, pretrained: bool) -> nn.Module | None:
    if not pretrained:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if source == "timm":
                return library.create_model(name)
            has_backbone = "weights_backbone" in inspect.signature(library.get_model_builder(name)).parameters
            return library.get_model(name, weights=None, **({"weights_backbone": None} if has_backbone else {}))
    with contextlib.suppress(Exception):  # whatever the hub's client raises: the caller goes on without
        if source == "torchvision":
            return library.get_model(name, weights="DEFAULT")
        return library.create_model(name, pretrained=True)
    return None


def _timm_shape(library: ModuleType, name: str) -> tuple[int, ...] | None:
    config = library.get_pretrained_cfg(name)
    return tuple(config.input_size) if config is not None else None


def _torchvision_shape(library: ModuleType, name: str, model: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of what the pretrained weights' own transforms make, without the batch."""
    weights = library.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    size = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    if size is None:  # detection and optical flow
        return None
    height, width = size[0], size[-1]
    if isinstance(own := getattr(model, "image_size", None), int):  # a transformer without weights may be of another
        height = width = own
    frames = (max(CLIP, weights.meta.get("min_temporal_size", 0)),) if "Video" in type(preset).__name__ else ()
    return (3, *frames, height, width)
