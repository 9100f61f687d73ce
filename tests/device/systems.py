"""Linux systems of other releases and processors, unpacked into a folder, with a Python and ONNX Runtime."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Debian's names of processors."""
RUNTIME = ("onnxruntime", "numpy", "flatbuffers", "protobuf", "packaging")
OLD_RUNTIME = (*RUNTIME, "coloredlogs", "humanfriendly", "sympy", "mpmath")
"""What onnxruntime needed to be imported before 1.20."""


@dataclass(frozen=True)
class System:
    """A release that debootstrap knows, for a processor as `uname -m` names it, its Python, the wheels it gets."""

    suite: str
    machine: str
    python: str
    wheels: tuple[str, ...] = RUNTIME

    @property
    def site(self) -> str:
        """Where its Python finds packages."""
        return f"usr/local/lib/python{self.python}/dist-packages"


PYTHONS = {
    "3.8": System("focal", platform.machine(), "3.8", OLD_RUNTIME),
    "3.13": System("trixie", platform.machine(), "3.13"),
}
"""Systems whose Python runs on this one."""


def why_not() -> str:
    """Return what is missing here to unpack one; empty if nothing."""
    missing = [name for name in ("debootstrap", "dpkg-deb", "tar") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed: apt-get install debootstrap" if missing else ""


def unpack(system: System, root: Path) -> None:
    """Unpack a system with its Python and wheels; half a minute, most of it to fetch them.

    Raises:
        CalledProcessError: a mirror or package registry cannot be reached.
    """
    # Debian does not have Ubuntu's keys; nothing of that system stays.
    trust = [] if system.suite in ("bookworm", "trixie") else ["--no-check-gpg"]
    include = "--include=python3-minimal,libpython3-stdlib"
    architecture = f"--arch={MACHINES[system.machine]}"
    _run("debootstrap", "--foreign", "--variant=minbase", include, architecture, *trust, system.suite, str(root))
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        _run("sh", "-c", f"dpkg-deb --fsys-tarfile {package} | tar -x -C {root}")
    tags = [f"manylinux_{p}_{system.machine}" for p in ("2_28", "2_27", "2_17")] + [f"manylinux2014_{system.machine}"]
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
    platforms = [x for tag in tags for x in ("--platform", tag)]
    _run(*pip, *platforms, "--python-version", system.python, "-d", str(root / "wheels"), *system.wheels)
    for wheel in (root / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / system.site)


def python_of(system: System, root: Path) -> Path:
    """Return a program that runs the Python of an unpacked system of this processor on this one.

    It takes this system's C library, or its own where that is newer: the older of them would lack what is asked of it.
    """
    libraries = [root / folder / f"{system.machine}-linux-gnu" for folder in ("usr/lib", "lib")]
    (own := root / "own").mkdir()
    for name in ("libffi", "libssl", "libcrypto", "libmpdec", "libexpat"):
        for file in (file for folder in libraries for file in folder.glob(f"{name}.so.*")):
            (own / file.name).unlink(missing_ok=True)
            (own / file.name).symlink_to(file)
    python, program = f"{root}/usr/bin/python{system.python}", root / f"python{system.python}"
    loader = next(libraries[0].glob("ld-linux-*.so.*"))
    for start in (
        f"LD_LIBRARY_PATH={own} exec {python}",
        f"exec {loader} --library-path {':'.join(map(str, libraries))} {python}",
    ):
        program.write_text(f'#!/bin/sh\nPYTHONHOME={root}/usr PYTHONPATH={root / system.site} {start} "$@"\n')
        program.chmod(0o755)
        if subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0:
            break
    return program


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
