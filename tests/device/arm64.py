"""An arm64 system under qemu, behind an sshd of this machine, with its own file systems and interpreters.

`python arm64.py ROOT COMMAND...` runs a command beside it. binfmt_misc is registered in a user namespace, so that this
machine's own is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import systems
from systems import RUNTIME, System

QEMU = "qemu-aarch64-static"
MAGIC = (
    r"\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff",
)
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
PLACE = "/mnt"
"""Where the root lies, in a mount namespace of its own: sshd wants all above it to be root's."""
SYSTEM = System("bookworm", "aarch64", "3.11", ("onnxruntime==1.32.0", *RUNTIME[1:]))
"""The newest ONNX Runtime: earlier ones abort or hang under qemu."""


def why_not() -> str:
    """Return what is missing for it here; empty if nothing."""
    if os.getuid() != 0:
        return "an arm64 root is made by root"
    if shutil.which(QEMU) is None:
        return f"{QEMU} not installed: apt-get install qemu-user-static"
    if reason := systems.why_not():
        return reason
    allowed = subprocess.run(["unshare", "--user", "--mount", "true"], capture_output=True, check=False)
    return "" if allowed.returncode == 0 else f"no user namespaces here: {allowed.stderr.decode().strip()}"


def enter(root: str, command: list[str]) -> None:
    """Become a command in namespaces in which arm64's programs run and the root lies at `PLACE`."""
    ready, mapped = os.pipe(), os.pipe()
    if child := os.fork():
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 65536\n")
        os.write(mapped[1], b".")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    libc.prctl(1, 15)  # to be ended with the parent
    os.write(ready[1], b".")
    os.read(mapped[0], 1)
    os.setgid(0)
    os.setuid(0)
    subprocess.run(["mount", "-t", "binfmt_misc", "none", "/proc/sys/fs/binfmt_misc"], check=True)
    rule = f":qemu-aarch64:M::{MAGIC[0]}:{MAGIC[1]}:{shutil.which(QEMU)}:FPO"
    Path("/proc/sys/fs/binfmt_misc/register").write_text(rule)
    for what, where in ((root, PLACE), ("/proc", f"{PLACE}/proc"), ("/dev", f"{PLACE}/dev")):
        subprocess.run(["mount", "--rbind", what, where], check=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    enter(sys.argv[1], sys.argv[2:])
