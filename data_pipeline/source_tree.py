"""A raw data set as published: folders and archives, local or in a bucket, as one tree of files."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipeline.archives import File, Index, read_bytes, read_index
from data_pipeline.raw_files import Listing, StoredObject, list_folder
from data_pipeline.storage import Place, is_local, join


class SourceTree:
    """A raw data set's files by name, "folder/file", in folders or in archives in the root.

    `archives` maps the names of the archives that may be there to the folder (of the root) that
    their content belongs in; names that start with that folder already stay as they are. A tar
    inside a tar is a folder. What is unpacked comes before what is in an archive, and an archive is
    opened when something of its folder is asked for. A folder is listed once.
    """

    def __init__(self, root: Place, archives: Mapping[str, str] | None = None) -> None:
        self.root = str(Path(root)) if is_local(root) else join(root)
        self.archives = archives or {}
        self._listings: dict[str, Listing] = {}
        self._present = [
            (self.place(name), folder)
            for name, folder in self.archives.items()
            if name in self._scan("").files
        ]

    def place(self, name: str) -> str:
        """The path or URI of a file or folder."""
        return join(self.root, name) if name else self.root

    def names(self) -> list[str]:
        """What lies in the root, sorted; nothing if it is not there."""
        top = self._scan("")
        return sorted([*top.folders, *top.files])

    def folders(self, name: str = "") -> tuple[str, ...]:
        """The folders in a folder, sorted; none if it is not there."""
        found = set(self._scan(name).folders)
        if name == "":
            found.update(folder for _, folder in self._present)
        for index in self._indexes(name):
            found.update(index.folders(name))
        return tuple(sorted(found))

    def files(self, name: str = "") -> dict[str, File]:
        """The files in a folder by their names, sorted; none if it is not there."""
        found: dict[str, File] = {}
        for index in self._indexes(name):
            found.update(index.files(name))
        found.update(self._scan(name).files)
        return dict(sorted(found.items()))

    def walk(self, name: str) -> Iterator[tuple[str, File]]:
        """All files below a folder, with their names from there on, sorted."""
        yield from self.files(name).items()
        for folder in self.folders(name):
            for rest, file in self.walk(f"{name}/{folder}"):
                yield f"{folder}/{rest}", file

    def file(self, name: str) -> File:
        """The file of that name; what it would be unpacked, if it is not there."""
        return self._find(name) or self._missing(name)

    def has_file(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._find(name) is not None

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""
        folder, _, base = os.path.normpath(name).rpartition("/")
        return self.has_file(name) or base in self.folders(folder)

    def holds(self, folder: str) -> bool:
        """Whether a folder of the root is there, or an archive for it, which is not opened."""
        return folder in self._scan("").folders or any(name == folder for _, name in self._present)

    def read(self, name: str) -> bytes:
        """The bytes of the file of that name; raises DataError if it is not there."""
        return read_bytes(self.file(name))

    def _find(self, name: str) -> File | None:
        folder, _, base = os.path.normpath(name).rpartition("/")
        if (unpacked := self._scan(folder).files.get(base)) is not None:
            return unpacked
        members = (index.files(folder).get(base) for index in self._indexes(folder))
        return next((member for member in members if member is not None), None)

    def _missing(self, name: str) -> File:
        place = self.place(name)
        return place if is_local(place) else StoredObject(place)

    def _scan(self, name: str) -> Listing:
        if name not in self._listings:
            self._listings[name] = list_folder(self.place(name))
        return self._listings[name]

    def _indexes(self, name: str) -> Iterator[Index]:
        """The indexes of the archives that can hold something in the folder `name`."""
        for path, folder in self._present:
            if f"{name}/".startswith(f"{folder}/"):
                yield read_index(path, folder)
