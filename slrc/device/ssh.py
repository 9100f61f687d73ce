"""One connection to a device: the system's `ssh`, with the user's own configuration, keys and agent.

A first call opens a control connection, later ones share it. `SLRC_SSH_CONFIG` names a configuration file to use in
place of the user's own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from slrc.device.failures import SSH_FAILED, ssh_failure
from slrc.errors import DeviceError

CONFIG_VARIABLE = "SLRC_SSH_CONFIG"
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "auto",
    "ControlPersist": "60",
}
BEGIN = "slrc-begins"
"""What comes before it was printed by the user's own shell."""
PATIENCE_S = 600.0
"""How long a command may take that does not wait for a job."""


class Done(NamedTuple):
    """How a command ended there, and what it printed."""

    code: int
    out: bytes
    said: str


class Connection:
    """Runs commands of the shell on a device. To be closed, as by `with`.

    Args:
        host: `user@name`, a name, or a Host of the user's ssh configuration.

    Raises:
        DeviceError: `host` is no host's name, or there is no ssh here.
    """

    def __init__(self, host: str) -> None:
        if not host or host.startswith("-") or any(c.isspace() or not c.isprintable() for c in host):
            raise DeviceError(f"`--device {host}`: expected a host for ssh", hint="such as pi@192.168.1.7")
        if shutil.which("ssh") is None:
            raise DeviceError("there is no `ssh` on this machine", hint="install openssh-client")
        self.host, self._was_reached = host, False
        # Short, and only for this user: the path of a socket ends at 107 characters.
        self._sockets = Path(tempfile.mkdtemp(prefix="slrc-ssh-", dir="/tmp" if Path("/tmp").is_dir() else None))
        config = os.environ.get(CONFIG_VARIABLE)
        options = {**OPTIONS, "ControlPath": str(self._sockets / "c")}
        self._command = ["ssh", *(["-F", config] if config else []), "-T"]
        self._command += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the control connection; jobs on the device go on."""
        if self._sockets.exists():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                end = [*self._command, "-O", "exit", "--", self.host]
                subprocess.run(end, capture_output=True, timeout=10, check=False)
            shutil.rmtree(self._sockets, ignore_errors=True)

    def run(self, script: str, given: bytes = b"", timeout: float | None = PATIENCE_S) -> Done:
        """Run a script of the shell with `given` as its input.

        Raises:
            DeviceError: the device cannot be reached.
            LinkLostError: the link was lost on the way.
        """
        with self._started(script, timeout) as (process, said):
            try:
                out, _ = process.communicate(given, timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise ssh_failure(self.host, f"it did not answer for {timeout:.0f} s") from None
            return self._done(process.returncode, out, said)

    def feed(self, script: str, write: Callable[[IO[bytes]], None]) -> Done:
        """Run a script whose input `write` writes, bit by bit.

        Raises:
            DeviceError: the device cannot be reached.
            LinkLostError: the link was lost on the way.
        """
        with self._started(script, None) as (process, said):
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # what failed there says so in its status
                write(process.stdin)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            out = process.stdout.read()
            return self._done(process.wait(), out, said)

    @contextmanager
    def _started(self, script: str, timeout: float | None) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        # Its messages go to a file: the control connection, which outlives the command, holds a pipe open.
        script = f"echo; echo {BEGIN}; LC_ALL=C; export LC_ALL; {script}"
        command = [*self._command, "--", self.host, f"exec sh -c {shlex.quote(script)}"]
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
            try:
                yield process, said
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def _done(self, code: int, out: bytes, said: IO[bytes]) -> Done:
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
        if code == SSH_FAILED:
            raise ssh_failure(self.host, text, was_reached=self._was_reached)
        self._was_reached = True
        return Done(code, out.partition(f"\n{BEGIN}\n".encode())[2], text)
