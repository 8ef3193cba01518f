"""One run, one work directory: a lock that the process that holds it takes with it when it dies.

On one host the kernel decides: the file is locked with flock, which ends with the process, however that ends. Other
hosts may not see that (a network file system need not carry flock), so the holder also touches the file every few
seconds, and what it wrote says who it is. Ages are by the file system's own clock: hosts' clocks differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from pathlib import Path
from typing import Self

import psutil

from capcur_jax.errors import InputError

NAME = "run.lock"
BEAT_S = 10.0
DEAD_S = 6 * BEAT_S  # another host's holder that was silent for so long is taken for dead


class Lock:
    """Holds `directory` until it is closed. A context manager.

    Raises:
      InputError: another process has it; names its host and process, and how long ago it was heard of.
    """

    def __init__(self, directory: Path):
        self.path = directory / NAME
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot(), "token": os.urandom(8).hex()}
        self._lost, self._stop = False, threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._taken()
        except OSError as error:
            raise InputError(f"{self.path} can't be written ({error.strerror}); give another --workdir") from None
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another process has taken the directory: this one was silent for too long."""
        return self._lost

    def check(self) -> None:
        """Raises InputError if the lock is lost: what is written from now on would be another run's."""
        if self._lost:
            raise InputError(
                f"{self.path.parent} was taken by another process ({_who(_read(self.path))}) while this one was "
                "stopped or cut off from the disk; that one goes on, this one ends here"
            )

    def close(self) -> None:
        """Gives the directory up."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _taken(self) -> int:
        """The open file with this process's name in it."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._try(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.stat(self.path)):  # else it was given up, and deleted
                        os.ftruncate(file, 0)
                        os.pwrite(file, json.dumps(self._me).encode() + b"\n", 0)
                        os.fsync(file)
                        return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _try(self, file: int) -> None:
        """Raises InputError if another process that lives has locked the file, or has its name in it."""
        known = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(_read(self.path), "it is running")
        except OSError:  # a file system without flock
            known = False
        holder, age = _read(self.path), self._age(file)
        if not holder:
            return
        if holder.get("boot") == self._me["boot"]:
            if not known and _lives(holder) and age < DEAD_S:
                self._refuse(holder, "it is running")
        elif age < DEAD_S:
            self._refuse(
                holder, f"last heard of {max(age, 0):.0f} s ago; if it is dead, try again in {DEAD_S - age:.0f} s"
            )

    def _refuse(self, holder: dict, heard: str) -> None:
        raise InputError(
            f"{self.path.parent} is another run's: {_who(holder)} has it ({heard}). Wait for its end, stop it, or give "
            "another --workdir"
        )

    def _age(self, file: int) -> float:
        """Seconds since the file was last touched."""
        now = self.path.with_name(f".{NAME}.{self._me['token']}")
        try:
            now.touch()
            return now.stat().st_mtime - os.fstat(file).st_mtime
        finally:
            now.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a disk that is away for a moment: the next beat may do better
                holder = _read(self.path)
                if holder and holder["token"] != self._me["token"]:
                    self._lost = True
                    return
                os.utime(self._file)


def _read(path: Path) -> dict:
    """What the holder wrote; {} for a file that is being written, or that a process left empty when it died."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) and "token" in found else {}


def _who(holder: dict) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"


def _lives(holder: dict) -> bool:
    return isinstance(holder.get("process"), int) and psutil.pid_exists(holder["process"])


def _boot() -> str:
    """Names the running kernel: the same in all containers of a host, another one after it was started again."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()
