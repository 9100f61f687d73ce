"""Check and time the models of a bundle on the machine that this lies on: `python3 bench.py`.

It needs Python 3.8 or later and no slrc: for ONNX Runtime numpy and onnxruntime, for TensorRT its trtexec alone. It
reads `manifest.json` beside it and writes `result.json`; `slrc/device/bundle.py` and `slrc/device/results.py` say what
is in them. Nothing is changed on the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import struct
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
FORMATS = {"float32": "f", "float16": "e", "float64": "d", "bool": "?", "uint8": "B"}
FORMATS.update({"int8": "b", "int16": "h", "int32": "i", "int64": "q"})
"""How `struct` names the types of tensors."""


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
            raise Failure("runtime", what, f"`{sys.executable} -m pip install onnxruntime` installs it") from error
        self.ort, self.threads = onnxruntime, manifest["threads"]
        self.version = onnxruntime.__version__
        needed = manifest["requires"]["onnxruntime"]
        if numbers(self.version) < numbers(needed):
            what = f"onnxruntime {self.version} is too old: the models need {needed}"
            raise Failure("runtime", what, "install a newer onnxruntime")

    def load(self, model: Data) -> Callable[[], Any]:
        """Return a call that runs the model on its inputs."""
        feeds = {tensor["name"]: read_tensor(tensor) for tensor in model["inputs"]}
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if not has_vnni():
            # Else x86 sums products of int8 in 16 bits, which overflow. With VNNI it would only be slower.
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self.threads:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        if model["kernels"]:
            options.register_custom_ops_library(str(path_of(model["kernels"])))
        session = self.ort.InferenceSession(str(path_of(model["file"])), options, providers=["CPUExecutionProvider"])
        names = [output["name"] for output in model["outputs"]] or None
        return lambda: session.run(names, feeds)

    def outputs(self, call: Callable[[], Any]) -> list[tuple[list[int], list[float]]]:
        """Return the shape and the numbers of each output of one run."""
        return [(list(array.shape), array.ravel().tolist()) for array in call()]

    def rounds(self, calls: list[Any], run: Data) -> int:
        """Return how many rounds of turns the run's seconds are enough for, after warming up."""
        seconds = run["seconds"]
        pace = sum(warm_up(self, call, seconds / 4 / len(calls)) for call in calls)
        return min(max(int(seconds * 0.75 / pace), run["least_rounds"]), MOST_ROUNDS)

    def turn(self, call: Callable[[], Any]) -> list[float]:
        """Return the milliseconds of a turn."""
        call()
        started = time.perf_counter()
        call()
        return [(time.perf_counter() - started) * 1e3]


# --- TensorRT, driven by its trtexec ----------------------------------------------------------------------------------

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
"""Where NVIDIA's packages put it, which is on no PATH."""
LEAST_WORKSPACE_MIB = 64
MOST_CACHED_BYTES = 4 << 30
SAMPLES = 200
"""How many times are kept of a process, evenly spaced: it runs a small model thousands of times."""
OUT_OF_MEMORY = ("insufficient memory", "OutOfMemory", "out of memory", "Killed")
KILLED = (137, -9)
TOLD = r"\(Sparsity\)|LayerType: |\[E\]|Global Memory: |" + "|".join(OUT_OF_MEMORY)
"""The lines of trtexec's log that are read."""


class Trtexec:
    """Engines of TensorRT, built once for this GPU. A turn is a process of its own, which runs an engine many times."""

    def __init__(self, manifest: Data) -> None:
        found = shutil.which("trtexec") or (TRTEXEC if os.access(TRTEXEC, os.X_OK) else "")
        if not found:
            raise Failure("runtime", "there is no trtexec here", f"install TensorRT; its trtexec is {TRTEXEC}")
        self.program, (code, told) = found, execute([found, "--help"], ".")
        self.flags, self.version = set(re.findall(r"--\w+", told)), trt_version(told)
        if not {"--onnx", "--saveEngine", "--loadEngine"} <= self.flags:
            raise Failure(
                "runtime", f"{found} does not work: status {code}: {last_line(told)}", "install TensorRT anew"
            )
        needed = manifest["requires"].get("tensorrt", "")
        if numbers(self.version) < numbers(needed):
            what = f"TensorRT is {self.version} here, and the models were written for {needed}"
            raise Failure("runtime", what, f"compile with `--target tensorrt:{'.'.join(self.version.split('.')[:2])}`")
        self.dla = "dla" in re.split(r"[:+]", manifest["target"])
        self.files = manifest["files"]
        self.engines: dict[str, Data] = {}
        self.cache = Path(os.environ.get("SLRC_ENGINES") or HERE / "engines").resolve()
        self.gpu = gpu_name()

    def load(self, model: Data) -> Data:
        """Return what runs a model: its engine, built unless it has been before, and the flags for its inputs."""
        self.cache.mkdir(parents=True, exist_ok=True)
        flags = build_flags(self.flags, model, self.dla)
        parts = [digest for name, digest in sorted(self.files.items()) if name.startswith(model["file"])]
        key = hashlib.sha256(json.dumps([parts, self.version, self.gpu, flags]).encode()).hexdigest()[:32]
        engine, facts = self.cache / f"{key}.engine", self.cache / f"{key}.json"
        if not (engine.exists() and facts.exists()):
            make_room(self.cache)
            built = build_engine(self.program, str(path_of(model["file"])), flags, self._timing_flags(), engine)
            write_whole(facts, json.dumps(built))
        else:
            os.utime(engine)
            built = dict(json.loads(facts.read_text()), cached=True)
        self.engines[model["name"]] = built
        return {"model": model, "engine": str(engine), "inputs": input_flags(model, numbers(self.version) < [9])}

    def outputs(self, call: Data) -> list[tuple[list[int], list[float]]]:
        """Return the shape and the numbers of each output of one run, in which all is sent there and back."""
        target = HERE / "outputs.json"
        flags = [f"--exportOutput={target}", "--iterations=1", "--duration=0", "--warmUp=0"]
        flags += [flag for flag in ("--includeDataTransfers", "--noCudaGraph") if flag in self.flags]
        built = self.engines[call["model"]["name"]]
        told = ("--dumpLayerInfo", "--profilingVerbosity=detailed")
        if not built["layers"]:  # a version that says them only when it runs an engine
            flags += [flag for flag in told if flag_of(flag) in self.flags]
        log = self._run(call, flags, target)
        built["layers"] = built["layers"] or layer_lines(log)
        named = {output["name"]: output for output in read_exported(target)}
        target.unlink()
        found = []
        for output in call["model"]["outputs"]:
            if output["name"] not in named:
                raise ValueError(f"trtexec wrote no output {output['name']}")
            shape = [int(size) for size in re.findall(r"\d+", named[output["name"]]["dimensions"])]
            found.append((shape, [float(x) for x in named[output["name"]]["values"]]))
        return found

    def rounds(self, calls: list[Any], run: Data) -> int:
        """Return how many rounds there are: one a block, each of processes that share the run's seconds."""
        count = RACE_ROUNDS if run["race"] else max(run["blocks"], 2)
        self.duration = max(0.25, run["seconds"] / count / len(calls))
        return count

    def turn(self, call: Data) -> list[float]:
        """Return the milliseconds that the GPU took for runs of one process, without transfers."""
        target = HERE / "times.json"
        flags = [f"--exportTimes={target}", "--warmUp=200", f"--duration={self.duration:g}", "--iterations=10"]
        flags += [f for f in ("--noDataTransfers", "--useSpinWait", "--useCudaGraph") if f in self.flags]
        self._run(call, flags, target)
        ms = [float(record["computeMs"]) for record in json.loads(target.read_text())]
        target.unlink()
        return ms[:: max(1, len(ms) // SAMPLES)]

    def _run(self, call: Data, flags: list[str], written: Path) -> str:
        """Run an engine; return what was logged."""
        command = [self.program, f"--loadEngine={call['engine']}", *call["inputs"], *flags]
        command += ["--useDLACore=0"] if self.dla else []
        code, log = execute(command)
        if code or not written.exists():
            raise ValueError(f"trtexec failed with status {code}: {last_error(log)}")
        return log

    def _timing_flags(self) -> list[str]:
        """Return where the builder keeps what tactics took, for the next engine."""
        name = hashlib.sha256(json.dumps([self.version, self.gpu]).encode()).hexdigest()[:16]
        return [f"--timingCacheFile={self.cache}/{name}.timing"] if "--timingCacheFile" in self.flags else []


def flag_of(option: str) -> str:
    """Return an option without its value."""
    return option.split("=")[0]


def build_flags(known: set[str], model: Data, dla: bool) -> list[str]:
    """Return how to build a model's engine, by what a version's trtexec knows.

    From 10.0 on a network's types are those of its file, and 11 knows no other way; before, and for a DLA before 11,
    they are what float16 may be taken for, and int8 where the file rounds. Float32 is not narrowed to TF32.
    """
    half, typed = model["precision"] == "float16", "--stronglyTyped" in known and not dla
    own = {"float16": ["--fp16"], "int8": ["--int8"]}.get(model["precision"], [])
    flags = ["--sparsity=enable"]
    flags += ["--useDLACore=0", "--allowGPUFallback"] if dla else []
    flags += ["--stronglyTyped"] if typed else own
    flags += [] if half else ["--noTF32"]
    flags += ["--skipInference" if "--skipInference" in known else "--buildOnly"]
    flags += ["--profilingVerbosity=detailed", "--dumpLayerInfo", "--verbose"]
    return [flag for flag in flags if flag_of(flag) in known] + shape_flags(model)


def shape_flags(model: Data) -> list[str]:
    """Return the range of batches, where an input's first dimension may vary."""
    dynamic = [tensor for tensor in model["inputs"] if tensor["name"] in model.get("dynamic_inputs", ())]
    if not dynamic:
        return []
    most = model["max_batch"] or 0

    def flag(end: str, batch: Callable[[int], int]) -> str:
        shapes = [f"{quoted(t['name'])}:{shape_text([batch(t['shape'][0]), *t['shape'][1:]])}" for t in dynamic]
        return f"--{end}Shapes={','.join(shapes)}"

    return [flag("min", lambda size: 1), flag("opt", lambda size: size), flag("max", lambda size: max(most, size))]


def input_flags(model: Data, narrow: bool) -> list[str]:
    """Return the shapes and files of a model's inputs; where `narrow`, as before 9.0, int64 inputs are int32 ones."""
    dynamic = [t for t in model["inputs"] if t["name"] in model.get("dynamic_inputs", ())]
    shapes = ",".join(f"{quoted(t['name'])}:{shape_text(t['shape'])}" for t in dynamic)
    files = []
    for i, tensor in enumerate(model["inputs"]):
        path = path_of(tensor["file"])
        if narrow and tensor["dtype"] == "int64":
            values = read_numbers(tensor)
            path = HERE / f"{model['name']}.input_{i}.int32"
            path.write_bytes(struct.pack(f"<{len(values)}i", *(int(x) for x in values)))
        files.append(f"{quoted(tensor['name'])}:{os.path.relpath(str(path), str(HERE))}")
    return ([f"--shapes={shapes}"] if shapes else []) + ["--loadInputs=" + ",".join(files)]


def quoted(name: str) -> str:
    """Return a name as trtexec takes it, which would split one with a colon or a comma."""
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{name}'"


def shape_text(shape: list[int]) -> str:
    """Return a shape as trtexec takes it."""
    return "x".join(str(size) for size in shape) or "scalar"


def build_engine(program: str, model: str, flags: list[str], timing: list[str], engine: Path) -> Data:
    """Build an engine; where memory is short, again and again with half the workspace. Return what was said of it."""
    partial, workspace, started = engine.with_suffix(".partial"), 0, time.perf_counter()
    while True:
        limit = [f"--memPoolSize=workspace:{workspace}"] if workspace else []
        code, log = execute([program, f"--onnx={model}", f"--saveEngine={partial}", *flags, *timing, *limit])
        if code == 0 and partial.exists():
            partial.replace(engine)
            break
        if partial.exists():
            partial.unlink()
        if code not in KILLED and not any(word in log for word in OUT_OF_MEMORY):
            raise ValueError(f"the engine could not be built: {last_error(log)}")
        workspace = (workspace or device_memory_mib(log)) // 2
        if workspace < LEAST_WORKSPACE_MIB:
            what = "the engine's build ran out of memory, even with a small workspace"
            raise Failure("memory", what, "end other programs on the device, or give it swap")
    return {
        "layers": layer_lines(log),
        "sparsity": [line[line.index("(Sparsity)") :] for line in log.splitlines() if "(Sparsity)" in line],
        "skipped_tactics": sum(1 for line in log.splitlines() if "Skipping tactic" in line),
        "workspace_mib": workspace,
        "seconds": round(time.perf_counter() - started, 1),
        "cached": False,
    }


def layer_lines(log: str) -> list[str]:
    """Return what a log says of each layer of an engine, in a line each."""
    return [line[line.index("Name: ") :] for line in log.splitlines() if re.search(r"\bName: .*LayerType: ", line)]


def device_memory_mib(log: str) -> int:
    """Return how much memory the GPU has, as trtexec logs it; else the system's, which a Jetson's GPU shares."""
    said = re.findall(r"Global Memory: (\d+) MiB", log)
    meminfo = re.findall(r"MemTotal: *(\d+)", read_text(Path("/proc/meminfo")))
    return int(said[0]) if said else int(meminfo[0]) // 1024 if meminfo else 4096


def make_room(cache: Path) -> None:
    """Remove the engines that were not used for the longest time, where there are too many."""
    engines = sorted(cache.glob("*.engine"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in engines)
    for path in engines:
        if total <= MOST_CACHED_BYTES:
            break
        total -= path.stat().st_size
        path.unlink()


def execute(command: list[str], told: str = TOLD) -> tuple[int, str]:
    """Run a program to its end; return its status, and of what it printed the lines that tell something, and the last.

    A builder that says everything may print more than a small device's memory holds.
    """
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(HERE))
    except OSError as error:
        return 127, str(error)
    kept, last = [], ""
    assert process.stdout is not None
    for data in process.stdout:
        last = data.decode("utf-8", "replace").rstrip()
        if re.search(told, last):
            kept.append(last)
    return process.wait(), "\n".join(kept if kept[-1:] == [last] else [*kept, last])


def trt_version(told: str) -> str:
    """Return the version that trtexec prints: `8502` is 8.5.2, `100300` is 10.3.0."""
    found = re.search(r"\[TensorRT v([\d.]+)\]", told)
    digits = found.group(1) if found else ""
    if not digits or "." in digits:
        return digits
    parts = re.fullmatch(r"(\d)(\d)(\d\d)", digits) or re.fullmatch(r"(\d+)(\d\d)(\d\d)", digits)
    return ".".join(str(int(part)) for part in parts.groups()) if parts else ""


def gpu_name() -> str:
    """Return what the GPU is: as its driver says, else the board, which on a Jetson names it too."""
    listed = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return listed or read_text(Path("/proc/device-tree/model")).strip("\0") or platform.machine()


def read_exported(path: Path) -> Data:
    """Return the outputs that trtexec wrote, with numbers that JSON does not have named as Python does."""
    text = re.sub(r"(?<=[\[,\s])-?nan(?=[\],\s])", "NaN", path.read_text())
    return json.loads(re.sub(r"(?<=[\[,\s])(-?)inf(?=[\],\s])", r"\1Infinity", text))


def last_error(log: str) -> str:
    """Return the last error that was logged, else the last line."""
    errors = [line[line.index("[E]") + 4 :] for line in log.splitlines() if "[E] " in line]
    return errors[-1] if errors else last_line(log)


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


RUNTIMES: dict[str, Any] = {"ort": OnnxRuntime, "tensorrt": Trtexec}
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


def read_numbers(tensor: Data) -> list[float]:
    """Return a tensor's numbers as a list."""
    data, form = path_of(tensor["file"]).read_bytes(), FORMATS[tensor["dtype"]]
    return list(struct.unpack(f"<{len(data) // struct.calcsize('<' + form)}{form}", data))


def read_tensor(tensor: Data) -> Any:
    """Return a tensor's numbers as an array."""
    import numpy

    array = numpy.fromfile(str(path_of(tensor["file"])), dtype=numpy.dtype(tensor["dtype"]).newbyteorder("<"))
    return array.reshape(tensor["shape"]).astype(tensor["dtype"], copy=False)


# --- outputs --------------------------------------------------------------------------------------------------------


def compare(model: Data, outputs: list[tuple[list[int], list[float]]]) -> list[Data]:
    """Return, for every output that something is expected of, how far it is off as a share of the largest value."""
    found = []
    for output, (shape, values) in zip(model["outputs"], outputs):
        if output["file"] is None:
            continue
        same = shape == output["shape"]
        largest, error = errors(read_numbers(output), values) if same else (math.inf, math.inf)
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


def errors(expected: list[float], values: list[float]) -> tuple[float, float]:
    """Return the largest difference, and the same as a share of the largest finite value expected."""
    error, scale = 0.0, 0.0
    for a, b in zip(expected, values):
        if a == b or (a != a and b != b):
            apart = 0.0
        else:
            apart = abs(a - b)
        error = max(error, apart if apart == apart else math.inf)
        scale = max(scale, abs(a) if math.isfinite(a) else 0.0)
    return float(error), float(error / scale if scale else error)


# --- time -----------------------------------------------------------------------------------------------------------


def time_run(runtime: Any, calls: dict[str, Any], run: Data) -> Data:
    """Time models in turns: in their order, then back, then again, in blocks between which the clocks are read."""
    names = [name for name in dict.fromkeys(run["models"]) if name in calls]
    result: Data = {"models": names, "blocks": []}
    if not names:
        return result
    rounds = runtime.rounds([calls[name] for name in names], run)
    per_block = max(1, rounds // run["blocks"])
    while True:
        count, before = rounds if run["race"] else per_block, len(result["blocks"])
        block = time_block(runtime, calls, names, range(before * count, (before + 1) * count), run["race"])
        result["blocks"].append(block)
        mark_drift(result["blocks"])
        kept = sum(1 for b in result["blocks"] if not b["drift"])
        if kept >= run["blocks"] or run["race"] or len(result["blocks"]) >= SPARE_BLOCKS * run["blocks"]:
            return result


def time_block(runtime: Any, calls: dict[str, Any], names: list[str], rounds: range, race: bool) -> Data:
    """Return the milliseconds of every turn of a block, and the clocks before and after it.

    The rounds are numbered through all blocks, of one round too: each goes the other way round than the one before.
    """
    before = read_clocks()
    times: dict[str, list[float]] = {name: [] for name in names}
    running = list(names)
    for i in rounds:
        for name in running if i % 2 == 0 else running[::-1]:
            times[name] += runtime.turn(calls[name])
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


def has_vnni() -> bool:
    """Whether the processor has instructions that sum four products of bytes in 32 bits."""
    return "vnni" in read_text(Path("/proc/cpuinfo"))


def machine_state() -> Data:
    """Return what a time depends on besides the model: clocks, governor, power mode, throttling, load."""
    state: Data = dict(read_clocks())
    cpufreq = "devices/system/cpu/cpu[0-9]*/cpufreq/"
    governors = sorted({read_text(path) for path in SYSTEM.glob(cpufreq + "scaling_governor")} - {""})
    state["governor"] = " ".join(governors)
    most = numbers_in(cpufreq + "cpuinfo_max_freq")
    if most:
        state["most_mhz"] = max(most) / 1e3
    gpu = [numbers_in(f"class/devfreq/*.g[ap]*/{end}_freq") for end in ("min", "max")]
    if all(gpu):
        state["gpu_mhz"] = [max(gpu[0]) / 1e6, max(gpu[1]) / 1e6]
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
            call = runtime.load(model)
            result["outputs"] += compare(model, runtime.outputs(call))
        except Failure:
            raise
        except Exception as error:  # whatever a runtime makes of a model: it costs that model only
            result["why_not"][model["name"]] = first_line(error)
            continue
        calls[model["name"]] = call
    result["engines"] = getattr(runtime, "engines", {})
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
    for name, engine in result["engines"].items():
        told = "found" if engine["cached"] else f"built in {engine['seconds']:.0f} s"
        if engine["workspace_mib"]:
            told += f", with a workspace of {engine['workspace_mib']} MiB, for which memory was enough"
        yield f"{name}, engine {told}: {len(engine['layers'])} layers; {'; '.join(engine['sparsity'][-2:])}".rstrip(
            "; "
        )
    for run in result["runs"]:
        kept = [b for b in run["blocks"] if not b["drift"]] or run["blocks"]
        for name in run["models"]:
            ms = [x for block in kept for x in block["ms"][name]]
            yield f"{name}: {statistics.median(ms):.3f} ms, {len(ms)} turns"
        for name in run["models"][1:]:
            pairs = [(block["ms"][run["models"][0]], block["ms"][name]) for block in kept]
            found = sorted(statistics.median(first) / statistics.median(ms) for first, ms in pairs)
            told = f"{statistics.median(found):.2f} times as fast as {run['models'][0]}"
            yield f"{name}: {told}, {found[0]:.2f} to {found[-1]:.2f} in blocks of turns"
        rejected = len(run["blocks"]) - sum(1 for b in run["blocks"] if not b["drift"])
        if rejected:
            yield f"{rejected} of {len(run['blocks'])} blocks rejected: the clock drifted"


def main() -> int:
    """Run, write `result.json` whole or not at all, and say what was found."""
    result: Data = {"result_version": 1, "runtime": "", "python": platform.python_version()}
    result.update({"outputs": [], "why_not": {}, "runs": [], "before": {}, "after": {}, "failure": None, "engines": {}})
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
    write_whole(HERE / "result.json", json.dumps(result))
    return code


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
