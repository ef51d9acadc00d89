import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_pipeline import archives
from data_pipeline.archives import (
    HeldMember,
    TarMember,
    ZipMember,
    file_stamp,
    is_inside,
    read_bytes,
    tar_members,
)
from data_pipeline.errors import DataError
from data_pipeline.source_tree import SourceTree

CONTENT = {"top/a.txt": b"first", "top/deep/b.bin": bytes(range(256)) * 300, "top/deep/c.jpg": b""}


@pytest.fixture(autouse=True)
def _fresh_indexes():
    archives.forget_archives()


def write_tar(path: Path | io.BytesIO, content: dict[str, bytes], mode: str = "w") -> None:
    target = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode=mode, **target) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def make_tree(root: Path, kind: str) -> SourceTree:
    if kind == "folder":
        for name, data in CONTENT.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    elif kind == "tar":
        write_tar(root / "x.tar", CONTENT)
    elif kind == "flat tar":  # its names do not begin with the folder
        write_tar(root / "x.tar", {name.removeprefix("top/"): d for name, d in CONTENT.items()})
    else:
        write_zip(root / "x.zip", CONTENT, {"zip": 8, "stored zip": 0}[kind])
    return SourceTree(root, {"x.tar": "top", "x.zip": "top"})


@pytest.mark.parametrize("kind", ["folder", "tar", "flat tar", "zip", "stored zip"])
def test_a_tree_is_the_same_packed_or_not(tmp_path, kind):
    tree = make_tree(tmp_path, kind)
    assert tree.folders() == ("top",)
    assert tree.folders("top") == ("deep",)
    assert list(tree.files("top")) == ["a.txt"]
    assert list(tree.files("top/deep")) == ["b.bin", "c.jpg"]
    assert tree.files("nowhere") == {}
    assert [name for name, _ in tree.walk("top")] == ["a.txt", "deep/b.bin", "deep/c.jpg"]
    assert {f"top/{name}": read_bytes(file) for name, file in tree.walk("top")} == CONTENT
    assert {name: tree.read(name) for name in CONTENT} == CONTENT
    assert [tree.exists(n) for n in ("top", "top/deep", "top/a.txt", "top/b", "else")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(DataError, match="top/b: No such file"):
        tree.read("top/b")


def test_what_is_unpacked_comes_first_and_what_is_not_is_found_too(tmp_path):
    tree = make_tree(tmp_path, "zip")
    (tmp_path / "top").mkdir()
    (tmp_path / "top/a.txt").write_bytes(b"newer")
    assert tree.read("top/a.txt") == b"newer"
    assert tree.read("top/deep/b.bin") == CONTENT["top/deep/b.bin"]
    assert tree.folders("top") == ("deep",)


def test_a_tar_in_a_tar_is_a_folder(tmp_path):
    inner = {}
    for name in ("n01", "n02"):
        buffer = io.BytesIO()
        write_tar(buffer, {f"{name}_{i}.JPEG": f"{name} {i}".encode() for i in range(3)})
        inner[f"{name}.tar"] = buffer.getvalue()
    write_tar(tmp_path / "images.tar", inner)
    tree = SourceTree(tmp_path, {"images.tar": "train"})
    assert tree.folders("train") == ("n01", "n02")
    files = tree.files("train/n02")
    assert {name: read_bytes(file) for name, file in files.items()} == {
        f"n02_{i}.JPEG": f"n02 {i}".encode() for i in range(3)
    }
    assert str(files["n02_1.JPEG"]) == f"{tmp_path}/images.tar/n02.tar/n02_1.JPEG"


def test_of_gzip_archives_lists_and_labels_are_held(tmp_path):
    write_tar(tmp_path / "x.tgz", {"top/a.txt": b"1", "top/b.mat": b"2", "top/c.jpg": b"3"}, "w:gz")
    tree = SourceTree(tmp_path, {"x.tgz": "top"})
    assert list(tree.files("top")) == ["a.txt", "b.mat"]
    assert isinstance(tree.file("top/b.mat"), HeldMember)
    assert tree.read("top/b.mat") == b"2"


def test_an_archive_is_opened_only_for_its_own_folder(tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"no archive")
    (tmp_path / "other").mkdir()
    tree = SourceTree(tmp_path, {"x.tgz": "top"})
    assert tree.folders() == ("other", "top")
    assert tree.holds("top")
    assert not tree.exists("else")
    with pytest.raises(DataError, match=r"x\.tgz: not a whole tar\.gz archive"):
        tree.exists("top/a")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_are_read_by_another_process(tmp_path, kind):
    members = pickle.loads(pickle.dumps(list(make_tree(tmp_path, kind).walk("top"))))
    archives.forget_archives()
    assert {f"top/{name}": member.read() for name, member in members} == CONTENT


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "top/../../up.txt"])
@pytest.mark.parametrize("suffix", [".tar", ".zip", ".tgz"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        write_zip(path, {name: b"x"})
    else:
        write_tar(path, {name: b"x"}, "w:gz" if "g" in suffix else "w")
    with pytest.raises(DataError, match="would lie outside of it"):
        SourceTree(tmp_path, {path.name: "top"}).files("top")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused_not_followed(tmp_path, kind):
    for name, mode in (("x.tar", "w"), ("x.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            info = tarfile.TarInfo("top/a.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        with pytest.raises(DataError, match=rf"{name}: its member 'top/a.txt' is a link"):
            SourceTree(tmp_path, {name: "top"}).files("top")


def test_folders_and_devices_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"top/{kind.decode()}")
            info.type = kind
            tar.addfile(info)
    assert tar_members(str(tmp_path / "x.tar")) == []


def write_two(path: Path, mode: str) -> None:
    write_tar(path, {"top/a.txt": b"1" * 700, "top/b.txt": b"2" * 700, "top/c.txt": b"3"}, mode)


def test_members_behind_a_damaged_header_are_not_lost_silently(tmp_path):
    path = tmp_path / "x.tar"
    write_two(path, "w")
    whole = path.read_bytes()
    second = whole.index(b"top/b.txt")
    path.write_bytes(whole[:second] + b"X" + whole[second + 1 :])
    with pytest.raises(DataError, match=rf"not a whole tar archive \(no end mark at byte {second}"):
        tar_members(str(path))
    path.write_bytes(whole[:second])  # cut where a member ends
    with pytest.raises(DataError, match="no end mark"):
        tar_members(str(path))


def test_a_damaged_class_of_imagenet_stays_an_error(tmp_path):
    buffer = io.BytesIO()
    write_tar(buffer, {"a.JPEG": b"x" * 600, "b.JPEG": b"y"})
    damaged = buffer.getvalue().replace(b"b.JPEG", b"B.JPEG")
    write_tar(tmp_path / "x.tar", {"n01.tar": damaged})
    tree = SourceTree(tmp_path, {"x.tar": "train"})
    for _ in range(2):
        with pytest.raises(DataError, match="no end mark"):
            tree.files("train/n01")


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_gzip_archive_is_named(tmp_path, damage):
    path = tmp_path / "x.tgz"
    write_two(path, "w:gz")
    data = path.read_bytes()
    if damage == "flip":  # the checksum in the last eight bytes
        data = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    path.write_bytes({"cut": data[:-30], "flip": data, "other": b"<html>"}[damage])
    with pytest.raises(DataError, match=r"x\.tgz: not a whole tar\.gz archive"):
        SourceTree(tmp_path, {"x.tgz": "top"}).files("top")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_cut_short_is_named(tmp_path, kind):
    make_tree(tmp_path, kind)
    path = tmp_path / f"x.{kind}"
    os.truncate(path, path.stat().st_size // 3)
    with pytest.raises(DataError, match=rf"x\.{kind}: not a whole {kind} archive"):
        SourceTree(tmp_path, {path.name: "top"}).files("top/deep")


def test_an_archive_that_shrinks_later_is_named(tmp_path):
    member = make_tree(tmp_path, "tar").file("top/deep/b.bin")
    os.truncate(tmp_path / "x.tar", 3000)
    with pytest.raises(DataError, match=r"x\.tar: ends before byte"):
        read_bytes(member)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_a_zip_is_found(tmp_path, method):
    write_zip(tmp_path / "x.zip", {"top/a.txt": b"some text " * 20}, method)
    member = SourceTree(tmp_path, {"x.zip": "top"}).file("top/a.txt")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[len("top/a.txt") + 40] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.zip/top/a\.txt: (not the bytes|does not unpack)"):
        read_bytes(member)


def test_a_zip_bomb_unpacks_no_further_than_its_promise(tmp_path):
    write_zip(tmp_path / "x.zip", {"top/a.txt": bytes(10_000_000)})
    honest = SourceTree(tmp_path, {"x.zip": "top"}).file("top/a.txt")
    assert isinstance(honest, ZipMember)
    liar = ZipMember(honest.archive, honest.name, honest.offset, 9, honest.packed, 8, honest.crc)
    with pytest.raises(DataError, match="not the bytes the archive promises"):
        liar.read()
    huge = ZipMember(honest.archive, honest.name, 0, archives.MAX_MEMBER + 1, 5, 8, 0)
    with pytest.raises(DataError, match="the limit is"):
        huge.read()
    with pytest.raises(DataError, match="the limit is"):
        TarMember(honest.archive, "x", 0, archives.MAX_MEMBER + 1).read()


def test_a_changed_archive_changes_the_stamp_of_its_members(tmp_path):
    member = make_tree(tmp_path, "tar").file("top/a.txt")
    before = file_stamp(member)
    assert before[0] == "x.tar/top/a.txt"
    assert before == file_stamp(member)
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    assert file_stamp(member) != before
    assert file_stamp(str(tmp_path / "none")) == ["none", None, None]


@pytest.mark.parametrize(
    ("path", "inside"),
    [("a/b", True), ("a/../b", True), ("../b", False), ("/b", False), ("a/../../b", False)],
)
def test_paths_from_data_files(path, inside):
    assert is_inside(path) is inside
