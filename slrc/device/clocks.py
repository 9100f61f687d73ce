"""Lock a device's clocks for a measurement, where its user agreed, and set them as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from slrc.device.failures import job_failure
from slrc.device.probe import DeviceInfo
from slrc.device.ssh import Connection
from slrc.errors import DeviceError

GOVERNORS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def lock_commands(info: DeviceInfo) -> tuple[str, str]:
    """Return the commands of the shell that lock a device's clocks, and that set them as they were.

    Raises:
        DeviceError: it has no clocks that can be locked.
    """
    if info.jetson_clocks:
        kept = "/tmp/slrc-jetson-clocks"
        return (
            f"sudo -n jetson_clocks --store {kept} && sudo -n jetson_clocks",
            f"sudo -n jetson_clocks --restore {kept}",
        )
    if info.governor and ";" not in info.governor:
        return _governor("performance"), _governor(info.governor)
    told = f"its processors have several governors ({info.governor})" if info.governor else "it has no governor"
    raise DeviceError(
        f"device `{info.host}`: its clocks cannot be locked: {told}, and no jetson_clocks",
        hint="leave `--lock-clocks` out: the report says that clocks were not locked",
    )


@contextmanager
def locked_clocks(connection: Connection, info: DeviceInfo, locked: bool) -> Iterator[None]:
    """Keep a device's clocks locked, if they are to be.

    Raises:
        DeviceError: they cannot be locked, as where `sudo` asks for a password.
    """
    if not locked:
        yield
        return
    lock, restore = lock_commands(info)
    done = connection.run(lock)
    if done.code:
        error = job_failure(info.host, "locking its clocks", done.code, done.said)
        raise DeviceError(error.message, hint="allow sudo there without a password, or leave `--lock-clocks` out")
    try:
        yield
    finally:
        connection.run(restore)


def _governor(name: str) -> str:
    return f"echo {name} | sudo -n tee {GOVERNORS} > /dev/null"
