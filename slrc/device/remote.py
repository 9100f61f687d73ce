"""slrc's one folder on a device: files by their content, bundles made of them, and jobs that outlive the link.

    .slrc/store/<sha256>    a file's content, sent once
    .slrc/incoming/<id>/    what an interrupted copy left: what arrived whole is taken from there
    .slrc/jobs/<id>/        a bundle while its runner works: log, pid, and at the end rc
    .slrc/models/<name>/    a bundle that was deployed

The folder lies in the home folder, or where `SLRC_DEVICE_FOLDER` says. It is made with a mark in it, and only a folder
with that mark is ever removed.
"""

from __future__ import annotations

import os
import re
import shlex
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from slrc.device.bundle import MANIFEST, RESULT, RUN, RUNNER, Manifest, digest_of
from slrc.device.failures import LinkLostError, job_failure
from slrc.device.ssh import Connection, Done
from slrc.errors import DeviceError

FOLDER_VARIABLE = "SLRC_DEVICE_FOLDER"
MARK = "made-by-slrc"
SPARE_BYTES = 16 << 20
"""What is left free on a device's disk."""
_PREPARE = r"""
umask 077
own='^(venv|libonnxruntime[.]so.*)$'
[ -d "$D" ] && [ ! -f "$D/MARK" ] && [ -n "$(ls -A "$D" | grep -Ev "$own")" ] && { echo foreign; exit; }
mkdir -p "$D" || exit 3
cd "$D" && : > MARK && mkdir -p store jobs incoming/"$ID" || exit 3
for file in incoming/"$ID"/*; do
    [ -f "$file" ] && [ "$(sha256sum < "$file" | cut -c 1-64)" = "${file##*/}" ] && mv -f "$file" store/
done
rm -rf incoming/"$ID"
while read -r digest; do [ -f store/"$digest" ] || echo "$digest"; done
"""
_RECEIVE = r"""
cd "$D" && mkdir -p incoming/"$ID" && cd incoming/"$ID" && tar -xf - || exit
for file in *; do
    [ "$(sha256sum < "$file" | cut -c 1-64)" = "$file" ] && mv -f "$file" ../../store/ || echo "$file"
done
cd ../.. && rm -rf incoming/"$ID"
"""
_PLACE = r"""
umask 077
cd "$D" && rm -rf "$TO" "$TO.part" && mkdir -p "$TO.part" || exit 3
while read -r digest name; do
    case $name in */*) mkdir -p "$TO.part/${name%/*}" ;; esac
    ln store/"$digest" "$TO.part/$name" 2> /dev/null || cp store/"$digest" "$TO.part/$name" || exit 3
done
mv "$TO.part" "$TO"
"""
_ALIVE = r"""
alive() { [ -s pid ] && [ "$(readlink /proc/"$(cat pid)"/cwd)" = "$(pwd -P)" ]; }
"""
_START = (
    _ALIVE
    + r"""
cd "$D/jobs/$ID" 2> /dev/null || { echo none; exit; }
if [ -f rc ]; then echo ended; elif alive; then echo running
elif [ -n "$COMMAND" ]; then
    rm -f pid
    setsid nohup sh -c 'echo $$ > pid; '"$COMMAND"' > log 2>&1; echo $? > rc.part; mv rc.part rc' \
        < /dev/null > /dev/null 2>&1 &
    echo started
else echo dead; fi
"""
)
_WAIT = (
    _ALIVE
    + r"""
cd "$D/jobs/$ID" || exit 3
missed=0
while [ ! -f rc ]; do
    if alive; then missed=0; else missed=$((missed + 1)); [ $missed -gt 50 ] && { echo dead; exit; }; fi
    sleep 0.2 2> /dev/null || sleep 1
done
cat rc
"""
)
_FORGET = r"""
[ -d "$D" ] || exit 0
while read -r digest; do rm -f "$D/store/$digest"; done
rmdir "$D"/incoming/* "$D"/incoming "$D"/store "$D"/jobs "$D"/models 2> /dev/null
[ "$(ls -A "$D")" = MARK ] && rm -f "$D/MARK" && rmdir "$D"
:
"""
_REMOVE = r"""
cd "$D" 2> /dev/null || { echo none; exit; }
[ -f MARK ] || { echo foreign; exit; }
for file in jobs/*/pid; do
    [ -f "$file" ] && [ ! -f "${file%pid}rc" ] || continue
    [ "$(readlink /proc/"$(cat "$file")"/cwd)" = "$(pwd -P)/${file%/pid}" ] &&
        kill -- -"$(cat "$file")" 2> /dev/null
done
du -sk . | cut -f 1
cd - > /dev/null && rm -rf "$D"
"""


def device_folder() -> str:
    """Return the name of slrc's folder on a device.

    Raises:
        DeviceError: `SLRC_DEVICE_FOLDER` is no such name.
    """
    name = os.environ.get(FOLDER_VARIABLE, ".slrc")
    if not re.fullmatch(r"/?[\w.-]+(/[\w.-]+)*", name, re.ASCII) or {".", ".."} & set(name.split("/")):
        raise DeviceError(
            f"{FOLDER_VARIABLE}={name!r}: expected a folder's path of letters, digits, `.`, `_` and `-`",
            hint="such as .slrc, or /data/slrc",
        )
    return name


class Remote:
    """What slrc does on a device: it sends files, runs bundles, and removes what it brought."""

    def __init__(self, connection: Connection, folder: str) -> None:
        self.connection, self.folder, self.host = connection, folder, connection.host

    def missing(self, stage: Stage) -> list[str]:
        """Return the contents that the device lacks; what an interrupted copy brought whole it keeps."""
        done = self._run(_PREPARE, "making a folder there", "\n".join(stage.paths) + "\n", ID=stage.id)
        listed = done.out.decode().split()
        if listed == ["foreign"]:
            raise self._foreign("used")
        return [digest for digest in stage.paths if digest in set(listed)]

    def send(self, stage: Stage, free_bytes: int | None = None) -> int:
        """Send what is missing of a bundle; return the number of files that were sent.

        Raises:
            DeviceError: the disk there is full, or a file arrived damaged.
            LinkLostError: the link was lost; what arrived whole is kept.
        """
        missing: list[str] = []
        try:
            missing = self.missing(stage)
            size = sum(stage.paths[digest].stat().st_size for digest in missing)
            if free_bytes is not None and size + SPARE_BYTES > free_bytes:
                raise DeviceError(
                    f"device `{self.host}`: its disk is full: {free_bytes >> 20} MiB are free, "
                    f"{(size + SPARE_BYTES) >> 20} are needed",
                    hint=f"free some space there, or `slrc deploy --remove --device {self.host}`",
                )
            if missing:
                self._send(stage, missing)
        except LinkLostError:
            raise
        except DeviceError:
            self.forget(missing)
            raise
        stage.sent = tuple(missing)
        return len(missing)

    def _send(self, stage: Stage, missing: Iterable[str]) -> None:
        def write(stream: IO[bytes]) -> None:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
                for digest in missing:
                    tar.add(stage.paths[digest].resolve(), digest, filter=_plain)

        done = self.connection.feed(self._script(_RECEIVE, ID=stage.id), write)
        if done.code:
            self._run('cd "$D" && rm -rf incoming/"$ID"', "cleaning up", ID=stage.id)
            raise job_failure(self.host, "copying", done.code, done.said)
        if wrong := done.out.decode().split():
            raise DeviceError(f"device `{self.host}`: {len(wrong)} files arrived damaged", hint="run it again")

    def place(self, stage: Stage, to: str) -> None:
        """Make a bundle's folder of contents that are there, such as `models/name`."""
        listed = "".join(f"{digest} {name}\n" for name, digest in stage.names.items())
        self._run(_PLACE, "unpacking", listed, TO=to)

    def state(self, stage: Stage) -> str:
        """Return `none`, `running`, `ended` or `dead`: what the bundle's job is."""
        return self._run(_START, "asking for the job", ID=stage.id, COMMAND="").out.decode().strip()

    def start(self, stage: Stage, command: str) -> None:
        """Start the bundle's runner, detached, in its folder."""
        self._run(_START, "starting the job", ID=stage.id, COMMAND=command)

    def wait(self, stage: Stage) -> int:
        """Wait for the job and return its status.

        Raises:
            LinkLostError: the link was lost; the job goes on.
            DeviceError: it ended without a status, as where the machine was switched off.
        """
        done = self.connection.run(self._script(_WAIT, ID=stage.id), timeout=None)
        text = done.out.decode().strip()
        if not text.isdigit():
            raise job_failure(self.host, "running", done.code or 137, done.said or "Killed")
        return int(text)

    def collect(self, stage: Stage, into: Path) -> str:
        """Bring the job's result into a folder, and remove the job; return the end of what it said."""
        log = self._run('tail -c 4000 "$D/jobs/$ID/log" 2> /dev/null; :', "reading its log", ID=stage.id)
        found = self._run(f'cat "$D/jobs/$ID/{RESULT}" 2> /dev/null; :', "reading the result", ID=stage.id)
        if found.out:
            (into / RESULT).write_bytes(found.out)
        self._run('rm -rf "$D/jobs/$ID"', "cleaning up", ID=stage.id)
        return log.out.decode("utf-8", "replace")

    def drop_job(self, stage: Stage) -> None:
        """Remove the bundle's job, if there is one."""
        self._run('cd "$D" 2> /dev/null && rm -rf jobs/"$ID" jobs/"$ID".part; :', "cleaning up", ID=stage.id)

    def forget(self, digests: Iterable[str]) -> None:
        """Remove contents; where nothing is left, the folder too."""
        self._run(_FORGET, "cleaning up", "".join(f"{digest}\n" for digest in digests))

    def remove(self) -> int | None:
        """Remove the whole folder and end its jobs; return its size in bytes, `None` where there was none.

        Raises:
            DeviceError: slrc did not make the folder.
        """
        said = self._run(_REMOVE, "removing its folder").out.decode().strip()
        if said == "foreign":
            raise self._foreign("removed")
        return 1024 * int(said) if said.isdigit() else None

    def _foreign(self, done: str) -> DeviceError:
        return DeviceError(
            f"device `{self.host}`: `{self.folder}` was not made by slrc: it will not be {done}",
            hint=f"name a folder of slrc's own in {FOLDER_VARIABLE}",
        )

    def _script(self, script: str, **values: str) -> str:
        given = {"D": self.folder, **values}
        return "".join(f"{k}={shlex.quote(v)}; " for k, v in given.items()) + script.replace("MARK", MARK)

    def _run(self, script: str, what: str, given: str = "", **values: str) -> Done:
        done = self.connection.run(self._script(script, **values), given.encode())
        if done.code:
            raise job_failure(self.host, what, done.code, done.said)
        return done


class Stage:
    """A bundle's folder, as files by their content. `id` is the content of all of it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        own = {name: digest_of(folder / name) for name in (MANIFEST, RUN)}
        self.names: Mapping[str, str] = {**manifest.files, **own}
        self.paths: Mapping[str, Path] = {digest: folder / name for name, digest in self.names.items()}
        self.id = own[MANIFEST][:24]
        self.sent: tuple[str, ...] = ()

    def passing(self) -> list[str]:
        """Return the contents that were sent and serve this bundle alone: not its runner, nor kernels."""
        lasting = {d for name, d in self.names.items() if name == RUNNER or name.endswith(".so")}
        return [digest for digest in self.sent if digest not in lasting]


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
