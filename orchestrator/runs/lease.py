"""Who drives a run: one process at a time, of all that share the storage.

owner.json   {"token", "who", "since", "process", "beat"}: `beat` grows as long as the owner lives
lock         on a disk: locked by the kernel for as long as it lives

An owner whose record no longer changes is dead, and whoever has watched it that long takes over;
no clocks of two machines are compared. In a bucket a conditional PUT decides between two that do.
On a disk the kernel's lock does, and tells at once of a death on this machine; between machines
whose locks do not reach each other, the last to write.
"""

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.bucket import BucketPath, hasty
from orchestrator.errors import RunError, RunTakenOver
from orchestrator.files import write_json

BEAT, DEAD_AFTER = 3.0, 20.0  # seconds
_TICK = 0.5  # seconds between looks at another's record
_SETTLED = 1.0  # seconds after which a takeover between two machines on a disk is looked at again

Record = dict[str, Any]
Found = tuple[Record, str | None]  # and what differs when it has changed; None: there is none
log = logging.getLogger(__name__)


def file_of(directory: Path) -> Path:
    """Where the owner of a run is written down."""
    return directory / "owner.json"


@contextmanager
def hold(directory: Path, attach: Callable[[str], None] | None = None) -> Iterator[None]:
    """Own a directory for as long as the block lasts; dead owners are succeeded.

    `attach`: told who the owner is, where there is one, to wait until it no longer is.

    Raises:
        RunError: another process owns it, or came first.
    """
    told = False
    with ExitStack() as stack:
        while True:
            try:
                lease = _take(directory, stack)
                break
            except RunError:
                if attach is None:
                    raise
                if not told:
                    attach(f"{_owned(directory)}; this command waits for it")
                    told = True
                time.sleep(_TICK)
        _held[directory] = lease
        try:
            with lease:
                yield
        finally:
            del _held[directory]


def check(directory: Path) -> None:
    """Called before a record that only the owner writes is written.

    Raises:
        RunTakenOver: this process owned the directory, and another does now.
    """
    if lease := _held.get(directory):
        lease.check()


def is_held(directory: Path) -> bool:
    """Whether a process owns a directory; watches it, where that is on another machine."""
    if not isinstance(directory, BucketPath) and _locked(directory):
        return True
    found = _read(directory)
    if _is_free(directory, found[0]):
        return False
    return _runs_here(found[0]["process"]) or _outlived(directory, found) is None


class _Lease:
    """A directory that this process owns; keeps the record changing from a thread of its own."""

    def __init__(self, directory: Path, record: Record, tag: str | None) -> None:
        self._directory = hasty(directory)
        self._record, self._tag = record, tag
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._write(self._record | {"token": None})
        except RunTakenOver:
            pass
        except OSError as error:  # away, or set aside under another name
            log.debug("%s: %s", self._directory, error)

    def check(self) -> None:
        found, _ = _read(self._directory)
        if found.get("token", self._record["token"]) != self._record["token"]:
            raise RunTakenOver(
                f"{self._directory.name}: {found['who']} took this run over; this command was "
                "given up and ends"
            )

    def _beat(self) -> None:
        told = False
        while not self._ended.wait(BEAT):
            try:
                self._write(self._record | {"beat": self._record["beat"] + 1})
                told = False
            except RunTakenOver as error:
                log.error("%s", error)
                return
            except OSError as error:  # while nobody reaches the storage, nobody takes over
                if not told:
                    log.warning("%s: not renewed: %s", file_of(self._directory), error)
                told = True

    def _write(self, record: Record) -> None:
        """Raises as `check`."""
        while (tag := _swap(self._directory, record, self._tag)) is None:
            self.check()
            self._tag = _read(self._directory)[1]  # of a write whose answer was lost
        self._record, self._tag = record, tag


_held: dict[Path, _Lease] = {}
_dead: dict[Path, str | None] = {}  # records that were watched in vain


def _take(directory: Path, stack: ExitStack) -> _Lease:
    """Become the owner of a directory; its lock is left to `stack`."""
    if not isinstance(directory, BucketPath) and not _lock(directory, stack):
        raise RunError(_refusal(directory))
    before = _read(directory)
    watched = not _is_free(directory, before[0])
    found = _outlived(directory, before) if watched else before
    record = {
        "token": uuid.uuid4().hex,
        "who": _who(),
        "since": time.time(),
        "process": _process(),
        "beat": 0,
    }
    tag = _swap(directory, record, found[1]) if found is not None else None
    if watched and not isinstance(directory, BucketPath):
        time.sleep(_SETTLED)
    if tag is None or _read(directory)[0].get("token") != record["token"]:
        stack.close()
        raise RunError(_refusal(directory))
    return _Lease(directory, record, tag)


def _outlived(directory: Path, found: Found) -> Found | None:
    """The record of an owner that was watched and is dead, or let go; None: it lives."""
    if _dead.get(directory) == found[1]:
        return found
    log.info("%s: watches whether %s still lives", directory.name, found[0]["who"])
    silence = 0.0
    while silence < DEAD_AFTER:
        began = time.monotonic()
        time.sleep(_TICK)
        now = _read(directory)
        if now[1] != found[1]:
            return now if _is_free(directory, now[0]) else None
        took = time.monotonic() - began
        # A storage that was away was so for the owner too, who now has time to speak.
        silence = silence + took if took < DEAD_AFTER / 4 else 0.0
    _dead[directory] = found[1]
    return found


def _is_free(directory: Path, record: Record) -> bool:
    """Whether nobody owns a directory, as far as one look tells; of one on a disk, the caller has
    seen that nobody has locked it."""
    if not record.get("token"):
        return True
    owner, here = record["process"], _process()
    if isinstance(directory, BucketPath):
        return _same(owner, here, "boot", "pids") and not _runs_here(owner)
    return _same(owner, here, "boot")


def _same(one: Record, other: Record, *names: str) -> bool:
    return all(one[name] and one[name] == other[name] for name in names)


def _read(directory: Path) -> Found:
    path = file_of(directory)
    if isinstance(path, BucketPath):
        data, tag = path.version()
        return (json.loads(data) if data else {}), tag
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, None
    return json.loads(text), text


def _swap(directory: Path, record: Record, tag: str | None) -> str | None:
    """Write the record in the place of the one that `tag` stands for; None: it has changed."""
    path = file_of(directory)
    if isinstance(path, BucketPath):
        return path.write_if(json.dumps(record, indent=2).encode(), tag)
    if _read(directory)[1] != tag:
        return None
    write_json(path, record)
    return _read(directory)[1]


def _lock(directory: Path, stack: ExitStack) -> bool:
    """Have the kernel lock a directory until `stack` is closed; one that looks is soon gone."""
    file = stack.enter_context((directory / "lock").open("a"))
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    stack.close()
    return False


def _locked(directory: Path) -> bool:
    try:
        with (directory / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _owned(directory: Path) -> str:
    """Who runs it, in words."""
    record = _read(directory)[0]
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.get("since")))
    owner = f"{record['who']} since {since}" if record.get("token") else "another process"
    return f"{directory.name} is being run by {owner}"


def _refusal(directory: Path) -> str:
    return (
        f"{_owned(directory)}; give the same command with --attach to wait "
        "for its result, or stop it (Ctrl-C there, or atrous stop STAGE) and give the same command "
        "again to go on in its place. One that died is succeeded by the same command, "
        f"{DEAD_AFTER:.0f} s after its last sign of life at the latest"
    )


def _who() -> str:
    """Who and where this is, for people."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    job = metadata.get("job_submission_id")
    process = f"process {os.getpid()} on {os.uname().nodename}"
    return f"Ray job {job} ({process})" if job else process


def _process() -> Record:
    """What tells this process from all others, of this machine and of others."""
    pid = os.getpid()
    return {"boot": _boot(), "pids": _pids(), "pid": pid, "started": _started(pid)}


def _runs_here(process: Record) -> bool:
    here = _same(process, _process(), "boot", "pids")
    return here and _started(process["pid"]) == process["started"]


@cache
def _boot() -> str:
    """Of the kernel; "" where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@cache
def _pids() -> str:
    """The name space of process ids: containers of one machine have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, as the kernel counts; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
