"""Tables on the terminal of what a device is, and of what was deployed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from slrc.device.probe import DeviceInfo
from slrc.reporting.tables import add_latency, make_table

if TYPE_CHECKING:
    from slrc.device.deploy import Deployment


def device_table(info: DeviceInfo) -> Table:
    """What a device is and has."""
    table = make_table(f"{info.host}: {info.name}", "", "")
    python = f"{info.python_version} ({info.python})" if info.python else "none"
    tensorrt = ", ".join(filter(None, [info.tensorrt, info.trtexec, info.tensorrt_python and "in Python"]))
    for what, text in (
        ("architecture", info.architecture + (", emulated" if info.emulated else "")),
        ("system", ", ".join(filter(None, [info.system, info.kernel, info.jetson]))),
        ("glibc", info.glibc or "none"),
        ("processor", ", ".join(filter(None, [info.cpu, f"{info.cores} cores"]))),
        ("memory", f"{info.memory_bytes / 2**30:.1f} GiB"),
        ("free disk", f"{info.free_bytes / 2**30:.1f} GiB"),
        ("governor", info.governor or "not told"),
        ("power mode", info.power_mode or "not told"),
        ("GPU", info.gpu or "none that nvidia-smi knows"),
        ("Python", python),
        ("ONNX Runtime", _onnxruntime(info)),
        ("TensorRT", tensorrt or "none"),
    ):
        table.add_row(what, text)
    return table


def _onnxruntime(info: DeviceInfo) -> str:
    if info.without_python:
        return f"{info.libonnxruntime}, without Python"
    return info.onnxruntime or f"none: {info.why_no_onnxruntime}"


def deployment_table(result: Deployment) -> Table:
    """What a deploy found."""
    table = make_table(f"{result.model} on {result.device.host}: {result.device.name}", "", "dense", "compiled", "")
    for output in result.outputs:
        error = f"{output.error:.1e}"
        sides = (error, "") if output.model == "dense" else ("", error)
        table.add_row(
            f"output {output.output}: equal", *sides, f"tolerance {output.tolerance:.0e} of the largest value"
        )
    add_latency(table, [result.latency])
    before, after = result.latency.states["before"], result.latency.states["after"]
    if result.engine is not None:
        table.add_row("engine", str(result.engine.dense), str(result.engine.compiled), "")
    for name in ("celsius", "mhz", "load"):
        if name in before and name in after:
            table.add_row(
                f"  {_NAMES[name]}",
                "",
                "",
                f"{_number(before, name)} before, {_number(after, name)} after",
            )
    table.add_row("folder there", "", "", result.folder)
    return table


_NAMES = {"celsius": "temperature, °C", "mhz": "clock, MHz", "load": "load"}


def _number(state: Mapping[str, Any], name: str) -> str:
    value = state[name]
    return f"{value:.1f}" if isinstance(value, (int, float)) else "not told"
