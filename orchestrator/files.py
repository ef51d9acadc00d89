"""Durable files, on a disk or in a bucket: whole or not there, also after a power cut."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from orchestrator.bucket import BucketPath

if TYPE_CHECKING:
    import torch


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, fsync and rename; in a bucket a PUT is all of that."""
    if isinstance(path, BucketPath):
        path.write_text(json.dumps(content, indent=2))
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> Any | None:
    """The content, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def append_text(path: Path, text: str) -> None:
    """Add to a text, for people to read."""
    if isinstance(path, BucketPath):
        path.append([text.encode()])
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def save_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write a safetensors file, through to the disk, readable as any other new file is."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if "I/O error" in str(error):  # such as a full disk
            raise OSError(str(error)) from None
        raise
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
    sync(path)


def save_object(path: Path, content: Any) -> None:
    """Write with torch.save, through to the disk."""
    import torch

    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # which its zip writer hides
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A new directory of this machine, to write in what then becomes `place`.

    Beside it, so that it takes one rename, or anywhere, where that is in a bucket.
    """
    if isinstance(place, BucketPath):
        with TemporaryDirectory(prefix="atrous-") as directory:
            yield Path(directory)
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(file: Path, place: Path) -> None:
    """Give a file of `staging` its name, in the place of what has it."""
    if isinstance(place, BucketPath):
        place.upload(file, lambda: None)
        return
    os.replace(file, place)
    sync(place.parent)


def local_copy(path: Path, digest: str) -> Path:
    """The file itself, or a copy of it on this machine where it lies in a bucket.

    Raises:
        ValueError: the sha256 of what came out of the bucket is not `digest`.
    """
    return path.download(digest) if isinstance(path, BucketPath) else path


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    if isinstance(path, BucketPath):
        return path.size()
    return path.stat().st_size if path.exists() else None


def tree_size(path: Path) -> int:
    """Bytes of all files below."""
    if isinstance(path, BucketPath):
        return sum(size for _, size in path.below())
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_tree(path: Path) -> None:
    """Delete all files below."""
    if not isinstance(path, BucketPath):
        shutil.rmtree(path)
        return
    for one, _ in path.below():
        one.unlink()


def sync(path: Path) -> None:
    """Force a file's (or directory's) content to disk; what a bucket has taken is there."""
    if isinstance(path, BucketPath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
