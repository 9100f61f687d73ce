"""What a device is: its architecture, system, runtimes, clocks and disk, asked in one script that changes nothing."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from slrc.device.failures import ILLEGAL_INSTRUCTION, job_failure, printable
from slrc.device.ssh import Connection

PROBE = r"""
ORT_DISABLE_TELEMETRY=1
export ORT_DISABLE_TELEMETRY
say() { printf '%s\t%s\n' "$1" "$(printf %s "$2" | tr '\n\t' '; ')"; }
first() { for name in "$@"; do command -v "$name" 2>/dev/null && return; done; }
say architecture "$(uname -m)"
say kernel "$(uname -sr)"
say system "$(. /etc/os-release 2>/dev/null; echo "$PRETTY_NAME")"
say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | sed -n 's/^glibc //p')"
say board "$(tr -d '\000' < /proc/device-tree/model 2>/dev/null)"
say cpu "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say features "$(sed -n 's/^flags[^:]*: *//p;s/^Features[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cores "$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
place=FOLDER
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
say free_kib "$(df -Pk "$place" | sed -n '2s/^[^ ]* *[0-9]* *[0-9]* *\([0-9-]*\).*/\1/p')"
say governor "$(cat /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor 2>/dev/null | sort -u)"
say jetson "$(head -n 1 /etc/nv_tegra_release 2>/dev/null)"
say power_mode "$(nvpmodel -q 2>/dev/null | head -n 2)"
say jetson_clocks "$(first jetson_clocks)"
say gpu "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
say seen_as "$(sh -c 'tr "\000" " " < /proc/$PPID/cmdline; :' 2>/dev/null)"
trtexec=$(first trtexec /usr/src/tensorrt/bin/trtexec)
say trtexec "$trtexec"
[ -n "$trtexec" ] && say tensorrt "$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9]*\)\].*/\1/p' | head -n 1)"
for library in FOLDER/libonnxruntime.so* /usr/local/lib/libonnxruntime.so* /usr/lib/libonnxruntime.so* \
    /usr/lib/*/libonnxruntime.so*; do
    [ -f "$library" ] || continue
    case $library in /*) ;; *) library=$PWD/$library ;; esac
    say libonnxruntime "$library"
    break
done
for python in FOLDER/venv/bin/python python3; do
    found=$(first "$python") || continue
    case $found in /*) ;; *) found=$PWD/$found ;; esac
    say python "$found"
    say python_version "$("$found" -c 'import platform; print(platform.python_version())' 2>&1 | tail -n 1)"
    said=$("$found" -c 'import numpy, onnxruntime; print("ort", onnxruntime.__version__)' 2>&1)
    say onnxruntime_status $?
    say onnxruntime "$(printf %s "$said" | sed -n 's/^ort //p')"
    say onnxruntime_said "$(printf %s "$said" | tail -n 1)"
    say tensorrt_python "$("$found" -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null | tail -n 1)"
    case $said in *ort\ *) break ;; esac
done
:
"""


class DeviceInfo(BaseModel):
    """What a device said of itself; a text is empty where it did not say."""

    model_config = ConfigDict(frozen=True)

    host: str
    architecture: str
    kernel: str = ""
    system: str = ""
    glibc: str = ""
    board: str = ""
    cpu: str = ""
    features: tuple[str, ...] = ()
    cores: int = 1
    memory_bytes: int = 0
    free_bytes: int = 0
    governor: str = ""
    jetson: str = ""
    power_mode: str = ""
    jetson_clocks: str = ""
    """Where the program is that locks a Jetson's clocks."""
    gpu: str = ""
    emulated: bool = False
    """Whether another machine plays this one: times there say nothing of the real one."""
    trtexec: str = ""
    tensorrt: str = ""
    tensorrt_python: str = ""
    python: str = ""
    python_version: str = ""
    onnxruntime: str = ""
    why_no_onnxruntime: str = ""
    """Of Python."""
    libonnxruntime: str = ""
    """The library alone, for the runner that needs no Python."""

    @property
    def without_python(self) -> bool:
        """Whether ONNX Runtime is there, but not for Python."""
        return bool(self.why_no_onnxruntime and self.libonnxruntime)

    @property
    def name(self) -> str:
        """The board's or the processor's name, else the architecture."""
        return self.board or self.cpu or self.architecture


def probe(connection: Connection, folder: str) -> DeviceInfo:
    """Ask a device what it is; `folder` is slrc's folder there, whose environment of Python is looked at first.

    Raises:
        DeviceError: it cannot be reached, or is no machine with a shell.
    """
    done = connection.run(PROBE.replace("FOLDER", folder))
    lines = done.out.decode("utf-8", "replace").splitlines()
    said = {name: printable(text) for name, _, text in (line.partition("\t") for line in lines)}
    if done.code or not said.get("architecture"):
        raise job_failure(connection.host, "asking what it is", done.code, done.said)
    family = {"arm64": "aarch64", "amd64": "x86_64"}.get(said["architecture"], said["architecture"])
    intel = bool({"sse2", "fpu"} & set(said.get("features", "").split()))
    version, why_not = _onnxruntime(said)
    return DeviceInfo(
        host=connection.host,
        **{name: text for name, text in said.items() if name in _TEXTS},
        architecture=family,
        features=tuple(said.get("features", "").split()),
        cores=_number(said, "cores") or 1,
        memory_bytes=1024 * _number(said, "memory_kib"),
        free_bytes=1024 * _number(said, "free_kib"),
        emulated=(intel and family != "x86_64") or "qemu" in said.get("seen_as", ""),
        tensorrt=_tensorrt_version(said.get("tensorrt", "")),
        onnxruntime=version,
        why_no_onnxruntime=why_not,
    )


_TEXTS = {
    *("kernel", "system", "glibc", "board", "cpu", "governor", "jetson", "power_mode", "gpu"),
    *("trtexec", "tensorrt_python", "python", "python_version", "jetson_clocks", "libonnxruntime"),
}


def _onnxruntime(said: dict[str, str]) -> tuple[str, str]:
    """Return the version of ONNX Runtime, and why there is none."""
    if not said.get("python"):
        return "", "there is no python3"
    if said.get("onnxruntime") and not _number(said, "onnxruntime_status"):
        return said["onnxruntime"], ""
    if _number(said, "onnxruntime_status") == ILLEGAL_INSTRUCTION:
        return "", "onnxruntime dies of an illegal instruction: it is for newer processors"
    where = PurePosixPath(said["python"])
    return "", f"{where} cannot import it: {said.get('onnxruntime_said', '')[:200] or 'it died'}"


def _tensorrt_version(digits: str) -> str:
    """Return a version of what trtexec prints: `8502` is 8.5.2, `100300` is 10.3.0."""
    parts = re.fullmatch(r"(\d)(\d)(\d\d)", digits) or re.fullmatch(r"(\d+)(\d\d)(\d\d)", digits)
    return ".".join(str(int(part)) for part in parts.groups()) if parts else ""


def _number(said: dict[str, str], name: str) -> int:
    text = said.get(name, "")
    return int(text) if text.isdigit() else 0
