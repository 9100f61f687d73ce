"""Check and time the models of a bundle on the machine that this lies on: `python3 bench.py`.

It needs Python 3.8 or later, numpy and onnxruntime, and no slrc. It reads `manifest.json` beside it and writes
`result.json`; `slrc/device/bundle.py` and `slrc/device/results.py` say what is in them. Nothing is changed on the
machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Iterator

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it leaves files in the home folder
HERE = Path(__file__).resolve().parent
SYSTEM = Path("/sys")
Data = Any
"""Values of JSON."""
MOST_ROUNDS = 1000
RACE_ROUNDS = 3
RACE_LEAD = 1.1
SPARE_BLOCKS = 2
"""How many times as many blocks are timed at most as were asked for, where some are rejected."""
CLOCK_DRIFT = 0.1
"""The share by which a block's clock may change, or lie off the others'."""
HEATING = 5.0
"""Degrees by which a block may heat or cool the machine."""


class Failure(Exception):  # noqa: N818
    """What keeps the bundle from running here: its kind, what and where, and what to do."""

    def __init__(self, kind: str, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.kind, self.what, self.hint = kind, what, hint


# --- runtimes: each loads a model, runs it once, and times one turn of it -------------------------------------------


class OnnxRuntime:
    """Sessions of ONNX Runtime on the CPU. A turn is two runs, of which the second counts: its caches are its own."""

    def __init__(self, manifest: Data) -> None:
        try:
            import onnxruntime
        except Exception as error:
            what = f"onnxruntime cannot be imported: {first_line(error)}"
            raise Failure("runtime", what, "install onnxruntime") from error
        self.ort, self.threads = onnxruntime, manifest["threads"]
        self.version = onnxruntime.__version__
        needed = manifest["requires"]["onnxruntime"]
        if numbers(self.version) < numbers(needed):
            what = f"onnxruntime {self.version} is too old: the models need {needed}"
            raise Failure("runtime", what, "install a newer onnxruntime")

    def load(self, model: Data, feeds: dict[str, Any]) -> Callable[[], Any]:
        """Return a call that runs the model on arrays by name."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if self.threads:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        if model["kernels"]:
            options.register_custom_ops_library(str(path_of(model["kernels"])))
        session = self.ort.InferenceSession(str(path_of(model["file"])), options, providers=["CPUExecutionProvider"])
        names = [output["name"] for output in model["outputs"]] or None
        return lambda: session.run(names, feeds)

    def outputs(self, call: Callable[[], Any]) -> Any:
        """Return the outputs of one run."""
        return call()

    def turn(self, call: Callable[[], Any]) -> float:
        """Return the milliseconds of a turn."""
        call()
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3


RUNTIMES: dict[str, Any] = {"ort": OnnxRuntime}
"""By the backend that a target names."""


# --- the bundle -----------------------------------------------------------------------------------------------------


def path_of(name: str) -> Path:
    """Return the path of a file of the bundle, which lies in its folder."""
    parts = name.split("/")
    if len(parts) > 2 or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise Failure("manifest", f"the manifest names `{name}`, which is no file of the bundle")
    return HERE.joinpath(*parts)


def read_manifest() -> Data:
    """Return the manifest, every file of which is as it says."""
    try:
        manifest = json.loads((HERE / "manifest.json").read_text())
        version = manifest["bundle_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"manifest.json cannot be read: {first_line(error)}"
        raise Failure("manifest", what, "copy the bundle again") from error
    if version != 1:
        raise Failure("manifest", f"the bundle has version {version}, this runner takes 1")
    for name, expected in sorted(manifest["files"].items()):
        if digest_of(path_of(name)) != expected:
            raise Failure("damaged", f"`{name}` is damaged: its sha256 is not the manifest's", "copy it again")
    return manifest


def digest_of(path: Path) -> str:
    """Return a file's sha256; of one that cannot be read, none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()


def check_machine(requires: Data) -> None:
    """Make sure that the kernels can load here."""
    here = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if requires["architecture"] and here != requires["architecture"]:
        what = f"the bundle is for {requires['architecture']}, this machine is {here}"
        raise Failure("architecture", what, f"compile with `--target ort:{here}`")
    found = glibc()
    if found and requires["glibc"] and numbers(found) < numbers(requires["glibc"]):
        what = f"glibc is {found} here, the kernels need {requires['glibc']}"
        raise Failure("glibc", what, "use a newer system, or compile with `--target ort:stock`")


def glibc() -> str:
    """Return the version of glibc; empty where there is none."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1]
    except (ValueError, OSError, IndexError, AttributeError):
        return ""


def numbers(version: str) -> list[int]:
    """Return a version as numbers that can be compared."""
    parts = []
    for part in version.split("."):
        digits = "".join(c for c in part if c.isdigit())
        if digits:
            parts.append(int(digits))
    return parts


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_tensor(tensor: Data) -> Any:
    """Return a tensor's numbers as an array."""
    import numpy

    array = numpy.fromfile(str(path_of(tensor["file"])), dtype=numpy.dtype(tensor["dtype"]).newbyteorder("<"))
    return array.reshape(tensor["shape"]).astype(tensor["dtype"], copy=False)


# --- outputs --------------------------------------------------------------------------------------------------------


def compare(model: Data, outputs: Any) -> list[Data]:
    """Return, for every output that something is expected of, how far it is off as a share of the largest value."""
    import numpy

    found = []
    for output, array in zip(model["outputs"], outputs):
        if output["file"] is None:
            continue
        expected, array = read_tensor(output), numpy.asarray(array)
        same = expected.shape == array.shape
        largest, error = errors(expected, array) if same else (float("inf"), float("inf"))
        found.append(
            {
                "model": model["name"],
                "output": output["name"],
                "error": repr(error),
                "largest": repr(largest),
                "tolerance": output["tolerance"],
                "passed": bool(error <= output["tolerance"]),
            }
        )
    return found


def errors(expected: Any, array: Any) -> tuple[float, float]:
    """Return the largest difference, and the same as a share of the largest finite value expected."""
    import numpy

    a, b = expected.astype(numpy.float64), array.astype(numpy.float64)
    if not a.size:
        return 0.0, 0.0
    with numpy.errstate(invalid="ignore"):
        same = (a == b) | (numpy.isnan(a) & numpy.isnan(b))
        apart = numpy.where(same, 0.0, numpy.abs(a - b))
    error = float(numpy.nan_to_num(apart, nan=numpy.inf, posinf=numpy.inf).max())
    scale = float(numpy.abs(numpy.where(numpy.isfinite(a), a, 0.0)).max())
    return error, error / scale if scale else error


# --- time -----------------------------------------------------------------------------------------------------------


def time_run(runtime: Any, calls: dict[str, Any], run: Data) -> Data:
    """Time models in turns: in their order, then back, then again, in blocks between which the clocks are read."""
    names = [name for name in dict.fromkeys(run["models"]) if name in calls]
    result: Data = {"models": names, "blocks": []}
    if not names:
        return result
    seconds = run["seconds"]
    pace = sum(warm_up(runtime, calls[name], seconds / 4 / len(names)) for name in names)
    rounds = min(max(int(seconds * 0.75 / pace), run["least_rounds"]), MOST_ROUNDS)
    per_block = max(1, rounds // run["blocks"])
    while True:
        block = time_block(runtime, calls, names, rounds if run["race"] else per_block, run["race"])
        result["blocks"].append(block)
        mark_drift(result["blocks"])
        kept = sum(1 for b in result["blocks"] if not b["drift"])
        if kept >= run["blocks"] or run["race"] or len(result["blocks"]) >= SPARE_BLOCKS * run["blocks"]:
            return result


def time_block(runtime: Any, calls: dict[str, Any], names: list[str], rounds: int, race: bool) -> Data:
    """Return the milliseconds of every turn of a block, and the clocks before and after it."""
    before = read_clocks()
    times: dict[str, list[float]] = {name: [] for name in names}
    running = list(names)
    for i in range(rounds):
        for name in running if i % 2 == 0 else running[::-1]:
            times[name].append(runtime.turn(calls[name]))
        if race and i + 1 >= RACE_ROUNDS:
            running = in_race(running, times)
            if len(running) == 1:
                break
    return {"ms": times, "before": before, "after": read_clocks(), "drift": ""}


def in_race(running: list[str], times: dict[str, list[float]]) -> list[str]:
    """Return those a quarter of whose turns are about as fast as the slowest quarter of the fastest one's."""
    leader = sorted(times[min(running, key=lambda name: statistics.median(times[name]))])
    behind = leader[-1 - len(leader) // 4]
    return [name for name in running if sorted(times[name])[len(times[name]) // 4] <= RACE_LEAD * behind]


def warm_up(runtime: Any, call: Any, least_s: float) -> float:
    """Take turns for a while; return the seconds of one."""
    started, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - started < least_s:
        runtime.turn(call)
        turns += 1
    return (time.perf_counter() - started) / turns


def mark_drift(blocks: list[Data]) -> None:
    """Say of every block why it does not count: its clock or temperature changed, or is not that of the others."""
    typical = {}
    for name in ("mhz", "work_ms"):
        values = [b["after"][name] for b in blocks if name in b["after"]]
        if values:
            typical[name] = statistics.median(values)
    for block in blocks:
        block["drift"] = drift(block["before"], block["after"], typical)


def drift(before: Data, after: Data, typical: Data) -> str:
    """Return what changed from the begin of a block to its end, or is not as in other blocks; empty if nothing."""
    for name, told in (("mhz", "clock {:.0f} MHz, then {:.0f}"), ("work_ms", "fixed work took {:.2f} ms, then {:.2f}")):
        if name in before and name in after:
            for earlier in (before[name], typical.get(name, after[name])):
                if abs(after[name] / earlier - 1) > CLOCK_DRIFT:
                    return told.format(earlier, after[name])
    if "celsius" in before and "celsius" in after and abs(after["celsius"] - before["celsius"]) > HEATING:
        return f"{before['celsius']:.0f} °C, then {after['celsius']:.0f}"
    return ""


def read_clocks() -> dict[str, float]:
    """Return how fast the processor is: its clock and temperature as the system says, and what fixed work takes."""
    found = {"work_ms": min(fixed_work_ms() for _ in range(5))}
    clocks = numbers_in("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    heat = numbers_in("class/thermal/thermal_zone*/temp")
    if clocks:
        found["mhz"] = max(clocks) / 1e3
    if heat:
        found["celsius"] = max(heat) / 1e3
    return found


def fixed_work_ms() -> float:
    """Return the milliseconds of some work that is the same each time."""
    started = time.perf_counter()
    sum(range(50000))
    return (time.perf_counter() - started) * 1e3


def numbers_in(pattern: str) -> list[int]:
    """Return the numbers in the files that there are; some sensors cannot be read."""
    found = []
    for path in SYSTEM.glob(pattern):
        text = read_text(path)
        if text.lstrip("-").isdigit():
            found.append(int(text))
    return found


def read_text(path: Path) -> str:
    """Return what is in a file; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def machine_state() -> Data:
    """Return what a time depends on besides the model: clocks, governor, power mode, throttling, load."""
    state: Data = dict(read_clocks())
    cpufreq = "devices/system/cpu/cpu[0-9]*/cpufreq/"
    governors = sorted({read_text(path) for path in SYSTEM.glob(cpufreq + "scaling_governor")} - {""})
    state["governor"] = " ".join(governors)
    most = numbers_in(cpufreq + "cpuinfo_max_freq")
    if most:
        state["most_mhz"] = max(most) / 1e3
    state["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    for name, command in (
        ("power_mode", ["nvpmodel", "-q"]),
        ("clocks", ["jetson_clocks", "--show"]),
        ("throttled", ["vcgencmd", "get_throttled"]),
    ):
        text = output_of(command)
        if text:
            state[name] = text
    return state


def output_of(command: list[str]) -> str:
    """Return what a program of the system prints; empty where there is none."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


# --- all of it ------------------------------------------------------------------------------------------------------


def bench(result: Data) -> None:
    """Check and time what the manifest says; fill in `result`."""
    manifest = read_manifest()
    check_machine(manifest["requires"])
    runtime = RUNTIMES[manifest["target"].split(":")[0]](manifest)
    result["runtime"] = runtime.version
    result["before"] = machine_state()
    calls = {}
    for model in manifest["models"]:
        try:
            feeds = {tensor["name"]: read_tensor(tensor) for tensor in model["inputs"]}
            call = runtime.load(model, feeds)
            result["outputs"] += compare(model, runtime.outputs(call))
        except Failure:
            raise
        except Exception as error:  # whatever a runtime makes of a model: it costs that model only
            result["why_not"][model["name"]] = first_line(error)
            continue
        calls[model["name"]] = call
    if all(output["passed"] for output in result["outputs"]):
        result["runs"] = [time_run(runtime, calls, run) for run in manifest["runs"]]
    result["after"] = machine_state()


def report(result: Data) -> Iterator[str]:
    """Return what was found, for people."""
    for name, why_not in result["why_not"].items():
        yield f"{name} cannot run: {why_not}"
    for output in result["outputs"]:
        state = "equal" if output["passed"] else "DIFFERS"
        error, tolerance = float(output["error"]), output["tolerance"]
        told = f"({error:.1e} of the largest value, tolerance {tolerance:.0e})"
        yield f"{output['model']}, output {output['output']}: {state} {told}"
    for run in result["runs"]:
        kept = [b for b in run["blocks"] if not b["drift"]] or run["blocks"]
        for name in run["models"]:
            ms = [x for block in kept for x in block["ms"][name]]
            yield f"{name}: {statistics.median(ms):.3f} ms, {len(ms)} turns"
        rejected = len(run["blocks"]) - sum(1 for b in run["blocks"] if not b["drift"])
        if rejected:
            yield f"{rejected} of {len(run['blocks'])} blocks rejected: the clock drifted"


def main() -> int:
    """Run, write `result.json` whole or not at all, and say what was found."""
    result: Data = {"result_version": 1, "runtime": "", "python": platform.python_version()}
    result.update({"outputs": [], "why_not": {}, "runs": [], "before": {}, "after": {}, "failure": None})
    code = 0
    try:
        bench(result)
        code = 0 if all(output["passed"] for output in result["outputs"]) and not result["why_not"] else 1
        for line in report(result):
            print(line)
    except Failure as failure:
        result["failure"] = {"kind": failure.kind, "what": failure.what, "hint": failure.hint}
        print(f"error: {failure.what}", f"hint: {failure.hint}" if failure.hint else "", sep="\n", file=sys.stderr)
        code = 2
    except Exception as error:
        traceback.print_exc()
        result["failure"] = {"kind": "internal", "what": f"the runner failed: {first_line(error)}", "hint": ""}
        code = 3
    aside = HERE / "result.json.partial"
    aside.write_text(json.dumps(result))
    aside.replace(HERE / "result.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
