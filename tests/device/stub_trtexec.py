"""A `trtexec` that builds and runs nothing: it takes the flags that a version knows, and prints what that one prints.

Its logs are written after the sources of NVIDIA/TensorRT (`sampleOptions.cpp`, `sampleReporting.cpp`, `sampleUtils.cpp`
by version), its documentation, and logs of Jetsons that others have published; none was recorded here.

`stub.json` beside it says which version it is, and what goes wrong. What it is called with is written to `calls.jsonl`.
An engine of it is a file that names the model; the outputs are those that the bundle, in which it runs, expects.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import sys
from pathlib import Path

SETTINGS = json.loads((Path(__file__).parent / "stub.json").read_text())
VERSION = SETTINGS["version"]
BANNER = f"TensorRT.trtexec [TensorRT v{VERSION}]" + (" [b99]" if len(VERSION) > 4 else "")

LOGS = Path(__file__).parent / "trtexec_logs"
ALL = """--help --onnx --minShapes --optShapes --maxShapes --memPoolSize --profilingVerbosity --refit --sparsity
--noTF32 --saveEngine --loadEngine --timingCacheFile --shapes --loadInputs --iterations --warmUp --duration
--noDataTransfers --useSpinWait --useCudaGraph --threads --verbose --dumpLayerInfo --exportTimes --exportOutput
--exportLayerInfo --device --useDLACore --allowGPUFallback"""
KNOWN = {
    "8502": f"{ALL} --fp16 --int8 --best --maxBatch --uff --model --buildOnly --workspace",
    "8601": f"{ALL} --fp16 --int8 --best --maxBatch --uff --model --skipInference --versionCompatible --heuristic",
    "100300": f"{ALL} --fp16 --bf16 --int8 --best --stronglyTyped --skipInference --stripWeights",
    "110100": " ".join(f for f in ALL.split() if f not in ("--noDataTransfers", "--useSpinWait", "--useCudaGraph"))
    + " --skipInference --includeDataTransfers --noSpinWait --noCudaGraph --stripWeights",
}[VERSION].split()

START = """&&&& RUNNING {banner} # {command}
[07/26/2026-16:04:09] [I] === Model Options ===
[07/26/2026-16:04:09] [I] Format: ONNX
[07/26/2026-16:04:09] [I] === Device Information ===
[07/26/2026-16:04:09] [I] Selected Device: Orin
[07/26/2026-16:04:09] [I] Compute Capability: 8.7
[07/26/2026-16:04:09] [I] Device Global Memory: 7620 MiB"""
SHORT = """[07/26/2026-16:04:15] [W] [TRT] Requested amount of GPU memory (2833252352 bytes) could not be allocated.
[07/26/2026-16:04:15] [W] [TRT] Skipping tactic 28 due to insufficient memory on requested size of 2833252352 detected \
for tactic 0x0000000204040736.
[07/26/2026-16:04:15] [E] Error[10]: Could not find any implementation for node conv + PWN(relu)."""


def main() -> int:
    """Do what the flags say."""
    given = dict((*argument.split("=", 1), "")[:2] for argument in sys.argv[1:])
    with (Path(__file__).parent / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    if "--help" in given:
        print(f"&&&& RUNNING {BANNER} # trtexec --help\n=== Model Options ===")
        print("".join(f"  {flag:<35}what it does\n" for flag in KNOWN))
        return 0
    print(START.format(banner=BANNER, command=" ".join(sys.argv)))
    if unknown := [flag for flag in given if flag not in KNOWN]:
        return failed(f"[07/26/2026-16:04:09] [E] Unknown option: {unknown[0]} {given[unknown[0]]}")
    return build(given) if "--onnx" in given else run(given)


def failed(why: str) -> int:
    """Say why it failed, as trtexec does."""
    print(f"{why}\n&&&& FAILED {BANNER} # {' '.join(sys.argv)}")
    return 1


def build(given: dict[str, str]) -> int:
    """Write an engine, unless there is to be too little memory for it."""
    if not {"--skipInference", "--buildOnly"} & set(given):
        return failed("[07/26/2026-16:04:09] [E] inference was not to be skipped")
    limit = re.search(r"workspace:(\d+)", given.get("--memPoolSize", ""))
    if (int(limit[1]) if limit else 1 << 30) > SETTINGS.get("most_workspace_mib", 1 << 30):
        if SETTINGS.get("killed"):
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return failed(SHORT)
    if said := SETTINGS.get("refuses"):
        return failed(f"[07/26/2026-16:04:12] [E] [TRT] {said}")
    Path(given["--saveEngine"]).write_text(hashlib.sha256(Path(given["--onnx"]).read_bytes()).hexdigest())
    print((LOGS / f"{VERSION}_build.txt").read_text() + f"&&&& PASSED {BANNER} # {' '.join(sys.argv)}")
    return 0


def run(given: dict[str, str]) -> int:
    """Write the times or the outputs of an engine."""
    engine = Path(given["--loadEngine"])
    if not engine.exists():
        return failed(f"[07/26/2026-16:04:09] [E] Error opening engine file: {engine}")
    name = model_of(engine.read_text())
    for pair in given["--loadInputs"].split(","):
        tensor, _, file = pair.rpartition(":")
        if not Path(file).exists():
            return failed(f"[07/26/2026-16:04:09] [E] Cannot open file {file} of {tensor}")
    if "--dumpLayerInfo" in given:  # 8.5 is played as saying nothing of an engine that it does not run
        print((LOGS / f"{VERSION}_run.txt").read_text())
    if path := given.get("--exportTimes"):
        slow = 2.0 if name == "dense" else 1.0
        records = [
            {"startComputeMs": i * slow, "computeMs": slow + i % 3 / 100, "latencyMs": slow} for i in range(1000)
        ]
        Path(path).write_text(json.dumps(records))
    if path := given.get("--exportOutput"):
        transferred = not VERSION.startswith("11") or "--includeDataTransfers" in given
        Path(path).write_text(outputs(name, transferred))
    print(f"&&&& PASSED {BANNER} # {' '.join(sys.argv)}")
    return 0


def model_of(digest: str) -> str:
    """Return the name of the bundle's model that an engine was built of, here or in an earlier bundle."""
    manifest = json.loads(Path("manifest.json").read_text())
    return next(m["name"] for m in manifest["models"] if manifest["files"][m["file"]] == digest)


def outputs(name: str, transferred: bool) -> str:
    """Return the outputs as trtexec exports them, with six digits; zeros where nothing was brought back."""
    parts = []
    for model in json.loads(Path("manifest.json").read_text())["models"]:
        for output in model["outputs"] if model["name"] == name else ():
            if output["file"] is None:  # nothing is expected
                parts.append(f'{{ "name" : "{output["name"]}", "dimensions" : "1", "values" : [ 0 ] }}')
                continue
            data = Path(output["file"]).read_bytes()
            values = [x + SETTINGS.get("error", 0.0) for x in struct.unpack(f"<{len(data) // 4}f", data)]
            shape = "x".join(map(str, output["shape"]))
            listed = ", ".join(f"{x if transferred else 0:g}" for x in values)
            parts.append(
                f'{{ "name" : "{output["name"]}"\n  , "dimensions" : "{shape}"\n  , "values" : [ {listed} ]\n  }}'
            )
    return "[\n  " + "\n, ".join(parts) + "\n]\n"


sys.exit(main())
