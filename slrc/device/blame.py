"""Which layer, in which form, computes something else on a device: outputs of all layers are compared there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slrc.backends import Artifact, Target
from slrc.backends.ort.backend import MODEL_FILE
from slrc.device.build_bundle import Source
from slrc.device.remote import Stage
from slrc.errors import SlrcError

if TYPE_CHECKING:
    import onnx

    from slrc.device.ssh_device import SshDevice


def blame(device: SshDevice, artifact: Path, target: Target, inputs: Sequence[Tensor], forms: Mapping[str, str]) -> str:
    """Return the first layer whose output differs there, and its form; empty where none does when all are returned.

    Args:
        device: where the model differs.
        artifact: the model's folder.
        target: what it was written for.
        inputs: what it is run on.
        forms: of the layers that are not dense, by the name of their weight.
    """
    try:
        with tempfile.TemporaryDirectory() as place:
            traced, folder = Path(place) / "traced", Path(place) / "bundle"
            traced.mkdir()
            folder.mkdir()
            layers = _trace(artifact, traced, forms)
            manifest = device.make_bundle(folder, "traced", target, [Source("traced", traced, inputs)], [], threads=1)
            stage = Stage(folder, manifest)
            result = device.run(stage)
            device.remote.forget(stage.paths)
    except (SlrcError, ValueError, OSError):  # a model that is too large to be written again, or a link that is lost
        return ""
    first = next((o.output for o in result.outputs if not o.passed), "")
    return f"layer `{layers[first]}`, form {forms.get(layers[first], 'dense')}" if first in layers else ""


def _trace(artifact: Path, folder: Path, forms: Mapping[str, str]) -> dict[str, str]:
    """Write an artifact again with the output of every layer among its own; return the layers' weights by output."""
    import onnx

    for path in artifact.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    described = Artifact.read(artifact).model_copy(update={"model_file": MODEL_FILE})
    model = onnx.load(artifact / MODEL_FILE)
    values = {v.name: v for v in model.graph.value_info}
    layers = {name: weight for name, weight in _layers(model, forms) if name in values}
    own = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([*(values[name] for name in layers), *own])
    for name in (described.model_file, "manifest.json"):
        (folder / name).unlink()
    onnx.save(model, folder / described.model_file)
    outputs = tuple(output.name for output in model.graph.output)
    described.model_copy(update={"outputs": outputs}).write(folder)
    return layers


def _layers(model: onnx.ModelProto, forms: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Return the output and the weight of every node that has one, in the order of the graph."""
    initializers = {i.name for i in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if name in initializers and "." in name:
                owners = [w for w in forms if name.startswith(w.rpartition(".")[0] + ".")]
                yield node.output[0], max(owners, key=len, default=name)
                break
