"""A device on this machine: a real sshd on loopback, with keys, configuration and a home folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

SSHD = next((path for path in ("/usr/sbin/sshd", shutil.which("sshd")) if path and Path(path).exists()), None)
NAME = "device"
"""The device's name in the ssh configuration."""


def why_no_sshd() -> str:
    """Return what is missing for a device here; empty if nothing."""
    missing = [name for name, path in (("sshd", SSHD), ("ssh", shutil.which("ssh"))) if path is None]
    return f"{' and '.join(missing)} not installed: apt-get install openssh-server openssh-client" if missing else ""


class Device:
    """An sshd in `folder`; `home` is where its commands start, `config` the client's configuration.

    `settings` are more lines of the server's configuration, `wrapper` is what it is started by.
    """

    def __init__(
        self, folder: Path, python: str | None = None, settings: str = "", wrapper: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True)
        self.port, self.wrapper = free_port(), wrapper
        self.config, self.known = folder / "ssh_config", folder / "known_hosts"
        self._user = pwd.getpwuid(os.getuid()).pw_name
        for key in ("host_key", "user_key"):
            _keygen(folder / key)
        (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
        self.programs = folder / "programs"
        self.programs.mkdir()
        if python is not None:
            self.program("python3", f'exec {python} "$@"')
        place = f"HOME={self.home} PATH={self.programs}:/usr/bin:/bin"
        self.program("login", f'cd {self.home} && exec env -i {place} sh -c "$SSH_ORIGINAL_COMMAND"')
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nPermitRootLogin yes\nPidFile none\n"
            + (settings or f"ForceCommand {self.programs}/login\n")
        )
        self.write_config()
        self.trust()
        self._server: subprocess.Popen[bytes] | None = None

    def program(self, name: str, script: str) -> None:
        """Give the device a program."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def write_config(self, **others: object) -> None:
        """Write the client's configuration; keywords replace its lines."""
        lines = {
            "HostName": "127.0.0.1",
            "Port": self.port,
            "User": self._user,
            "IdentityFile": self.folder / "user_key",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": self.known,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            **others,
        }
        self.config.write_text(f"Host {NAME}\n" + "".join(f"  {k} {v}\n" for k, v in lines.items()))

    def trust(self, key: str = "host_key") -> None:
        """Let the client know the host by a key."""
        kind, text = (self.folder / f"{key}.pub").read_text().split()[:2]
        self.known.write_text(f"[127.0.0.1]:{self.port} {kind} {text}\n")

    def start(self) -> None:
        """Start the server, and wait until it listens."""
        assert SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; empty
        log = (self.folder / "sshd.log").open("ab")
        command = [*self.wrapper, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self._server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(200):
            with socket.socket() as probe:
                if not self.wrapper and probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if "Server listening" in (self.folder / "sshd.log").read_text():
                return
            time.sleep(0.05)
        raise RuntimeError(f"sshd did not start: {(self.folder / 'sshd.log').read_text()}")

    def stop(self) -> None:
        """End the server and what it started, but not jobs."""
        if self._server is not None:
            self._server.terminate()
            self._server.wait(10)
            self._server = None

    def files(self) -> list[str]:
        """Return the names of everything in the home folder."""
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
