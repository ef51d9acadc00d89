"""The images a command names: files, directories, patterns, and objects under an s3:// prefix."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import RunError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
_S3 = "s3://"


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image to read; `read` raises OSError."""

    place: str  # path or URI
    name: PurePosixPath  # below what was named, without suffix
    read: Callable[[], bytes] = field(compare=False)


def find_images(places: Sequence[str]) -> list[ImageFile]:
    """The images at all places, in order, each once.

    Of directories and s3:// prefixes everything below with the suffix of an image is taken, hidden
    files left out; files named one by one, or by a pattern, are taken whatever they are.

    Raises:
        RunError: a place does not exist, cannot be listed, or holds no image.
    """
    images: dict[ImageFile, None] = {}
    for place in places:
        found = list(_in_bucket(place) if place.startswith(_S3) else _on_disk(place))
        if not found:
            raise RunError(f"{place}: no image there; looked for {', '.join(SUFFIXES)}")
        images.update(dict.fromkeys(found))
    return list(images)


def _on_disk(place: str) -> Iterator[ImageFile]:
    if "://" in place:
        raise RunError(f"{place}: only paths and s3://bucket/prefix can be read")
    path = Path(place).expanduser()
    if path.is_dir():
        yield from _files(_below(path), path)
    elif path.is_file():
        yield from _files([path], path.parent)
    elif glob.has_magic(place):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        files = (file for match in matches for file in _below(match))
        yield from _files(files, Path(*path.parts[:plain]))
    else:
        raise RunError(f"{place}: no such file or directory")


def _below(path: Path) -> list[Path]:
    """A file itself, or the images in a directory and those below."""
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if _is_image(file.relative_to(path).as_posix()))
    return sorted(file for file in files if file.is_file())


def _files(files: Iterable[Path], base: Path) -> Iterator[ImageFile]:
    for file in files:
        name = PurePosixPath(file.relative_to(base).with_suffix(""))
        yield ImageFile(place=str(file.resolve()), name=name, read=file.read_bytes)


def _is_image(name: str) -> bool:
    # That includes "..", which in a key would lead out of the output directory.
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def _in_bucket(place: str) -> Iterator[ImageFile]:
    """Objects whose key begins with the prefix; credentials and endpoint as boto3 finds them."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = place.removeprefix(_S3).partition("/")
    base = prefix[: prefix.rfind("/") + 1]
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    except (BotoCoreError, ClientError, ValueError) as error:
        raise RunError(f"{place}: cannot list it ({error})") from None
    for key in keys:
        named = key == prefix and not key.endswith("/")  # which is how folders are marked
        if named or _is_image(key.removeprefix(base)):
            name = PurePosixPath(key.removeprefix(base).lstrip("/")).with_suffix("")
            read = partial(_read_object, client, bucket, key)
            yield ImageFile(place=f"{_S3}{bucket}/{key}", name=name, read=read)


def _read_object(client: Any, bucket: str, key: str) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"cannot read the object ({error})") from None


def output_paths(image: ImageFile, directory: Path, endings: Sequence[str]) -> list[Path]:
    """What is written for an image: one file per ending, in the sub-directory of its name."""
    parent = directory / image.name.parent
    return [parent / f"{image.name.name}{ending}" for ending in endings]


def check_outputs(
    images: Sequence[ImageFile], places: Sequence[str], out: Path, endings: Sequence[str]
) -> None:
    """Check, before anything is written, that nothing will be overwritten or taken for an input.

    Raises:
        RunError: two images would be written to one file, or one over an input, or the output
            directory lies in a directory of images, where a second run would find its files.
    """
    directory = Path(os.path.realpath(out))
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir() and directory.is_relative_to(path.resolve()):
            raise RunError(f"--out {out} lies in {place}, whose images are read; choose another")
    inputs = {image.place for image in images}
    writers: dict[Path, ImageFile] = {}
    for image in images:
        for path in output_paths(image, directory, endings):
            other = writers.setdefault(path, image)
            if other is not image:
                raise RunError(
                    f"{other.place} and {image.place} would both be written to {path}; "
                    "predict them into different directories"
                )
            if str(path) in inputs:
                raise RunError(f"{path} is an input and would be overwritten; choose another --out")
