"""What went wrong on the way to a device or there: from an exit status and a text to one line and what to do."""

from __future__ import annotations

import re

from slrc.errors import DeviceError

SSH_FAILED = 255
KILLED = 137
ILLEGAL_INSTRUCTION = 132

_OF_SSH: tuple[tuple[str, str, str], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for .* has changed",
        "its host key is not the one that is known",
        "if the device was set up anew, forget the old key: `ssh-keygen -R {host}`; else find out who answers",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "its host key is not known",
        "connect once by hand, `ssh {host}`, and accept the key",
    ),
    (
        r"Permission denied \(",
        "it refused the key",
        "`ssh-copy-id {host}` puts one there; slrc asks for no password",
    ),
    (r"Too many authentication failures", "it refused all keys", "name the right one in ~/.ssh/config: IdentityFile"),
    (r"Bad configuration option|Can't open user config", "the ssh configuration cannot be read", "see `ssh -G {host}`"),
)
_OF_LINKS: tuple[tuple[str, str, str], ...] = (
    (r"Could not resolve hostname", "there is no host of that name", "check the name, and ~/.ssh/config"),
    (r"Connection refused", "nothing listens there", "start its ssh server, or name another port in ~/.ssh/config"),
    (
        r"Network is unreachable|No route to host|Connection timed out|Operation timed out|timed out during banner",
        "it does not answer",
        "is it switched on, and in this network?",
    ),
)
"""Of ssh too; where the device was reached before, they say no more than that the link was lost."""
_OF_JOBS: tuple[tuple[str, str, str], ...] = (
    (
        r"No space left on device",
        "its disk is full",
        "free some space there, or `slrc deploy --remove --device {host}`",
    ),
    (r"Read-only file system|Permission denied", "its folder cannot be written", "name another in SLRC_DEVICE_FOLDER"),
    (
        r"version `GLIBC(?:XX)?_[\d.]+' not found",
        "its glibc is too old: {found}",
        "use a newer system there, or compile with `--target ort:stock`",
    ),
    (
        r"cannot execute|Exec format error|wrong ELF class",
        "it cannot run what was sent: {found}",
        "compile for its architecture: `slrc targets --device {host}` shows it",
    ),
    (r"insufficient memory|out of memory|OutOfMemory", "it ran out of memory", "close other programs there"),
)


class LinkLostError(DeviceError):
    """The link was lost on the way: what was done is kept there, and a second run goes on with it."""


def ssh_failure(host: str, said: str, *, was_reached: bool = False) -> DeviceError:
    """Return the error of an ssh that did not get through, to a device that `was_reached` before or not."""
    for pattern, what, hint in _OF_SSH if was_reached else (*_OF_SSH, *_OF_LINKS):
        if re.search(pattern, said):
            return DeviceError(f"device `{host}`: {what} ({_last_line(said, pattern)})", hint=hint.format(host=host))
    return LinkLostError(
        f"device `{host}`: the link was lost ({_last_line(said) or 'ssh said nothing'})",
        hint="run the same command again: files that arrived are not sent again, and a job that runs there is found",
    )


def job_failure(host: str, what: str, code: int, said: str) -> DeviceError:
    """Return the error of something that failed on the device, such as a copy or a run."""
    for pattern, reason, hint in _OF_JOBS:
        if found := re.search(pattern, said):
            told = reason.format(found=_last_line(said, pattern) or found[0])
            return DeviceError(f"device `{host}`, {what}: {told}", hint=hint.format(host=host))
    if code == KILLED or re.search(r"\bKilled\b", said):
        return DeviceError(
            f"device `{host}`, {what}: the system killed it, as it does where memory runs out",
            hint="close other programs there, add swap, or compile a smaller model",
        )
    if code == ILLEGAL_INSTRUCTION:
        return DeviceError(
            f"device `{host}`, {what}: illegal instruction: the runtime there is for newer processors",
            hint="install another version of onnxruntime there",
        )
    return DeviceError(f"device `{host}`, {what}: failed with status {code}: {_last_line(said) or 'it said nothing'}")


def _last_line(said: str, pattern: str = "") -> str:
    """Return the last line, or the last that holds a pattern, as it can be shown in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and re.search(pattern, line)]
    return printable(lines[-1])[:200] if lines else ""


def printable(text: str) -> str:
    """Return what of a text from a device can be shown: no control characters, which a terminal would obey."""
    return "".join(c for c in text if c.isprintable())
