"""ImageNet and anything laid out like it: SOURCE/<split>/<class folder>/<picture>.

ImageNet itself also in the archives as published: ILSVRC2012_img_train.tar (a tar of a tar for each
class), and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz, which knows the classes of the
validation pictures.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence

from data_pipeline.archives import File, read_bytes
from data_pipeline.errors import DataError
from data_pipeline.formats.sample import (
    Item,
    Sample,
    Split,
    check_image,
    make_key,
    require_layout,
    require_split,
)
from data_pipeline.source_tree import SourceTree
from data_pipeline.storage import Place

ARCHIVES = {
    "ILSVRC2012_img_train.tar": "train",
    "ILSVRC2012_img_val.tar": "val",
    "ILSVRC2012_devkit_t12.tar.gz": "ILSVRC2012_devkit_t12",
}
_COUNTS = {"train": 1_281_167, "val": 50_000}
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_NUM_CLASSES = 1000
_EXTENSIONS = (".jpeg", ".jpg", ".png")


def splits(source: Place) -> tuple[str, ...]:
    """The folders of `source` that hold class folders, and val where the devkit labels it."""
    return _splits(SourceTree(source, ARCHIVES))


def read_split(source: Place, split: str) -> Split:
    """List one split; class ids count the sorted class folders of `train`, whatever the split.

    Raises:
        DataError: the layout is another, or a class folder is unknown to `train`.
    """
    tree = SourceTree(source, ARCHIVES)
    require_split(tree, split, _splits(tree))
    class_names = tree.folders("train") or _devkit_classes(tree)
    devkit = tree.exists(_TRUTH)
    flat = split == "val" and not tree.folders("val")
    found = _validation(tree) if flat else _class_folders(tree, split)
    items: list[Item] = []
    strangers: list[str] = []
    class_ids = {name: number for number, name in enumerate(class_names)}
    for name, base, file in found:
        if name not in class_ids:
            raise DataError(f"{tree.place(split)}: {base} is of class {name}, which train lacks")
        stem, extension = os.path.splitext(base)
        if extension.lower() not in _EXTENSIONS:
            strangers.append(f"{name}/{base}")
            continue
        # ImageNet's training pictures carry their class in the name already.
        key = make_key(stem if stem.startswith(f"{name}_") else f"{name}_{stem}")
        items.append(Item(key=key, files=(file,), label=class_ids[name]))
    return Split(
        task="classification",
        class_names=class_names,
        ignore_label=None,
        items=items,
        load=load,
        sources=(tree.file(_TRUTH), tree.file(_META)) if flat else (),
        expected_count=_COUNTS.get(split) if devkit else None,
        warnings=_warn_strangers(tree.place(split), strangers),
    )


def load(item: Item) -> Sample:
    """Read and check one picture.

    Raises:
        DataError: the picture is missing or broken.
    """
    file = item.files[0]
    image = read_bytes(file)
    extension, width, height = check_image(image, str(file))
    return Sample(
        key=item.key,
        image=image,
        image_extension=extension,
        label=str(item.label).encode("ascii"),
        label_extension="cls",
        width=width,
        height=height,
        labels=(item.label,),
    )


def _splits(tree: SourceTree) -> tuple[str, ...]:
    labelled = tree.exists(_TRUTH) and tree.exists(_META)
    if not labelled:
        require_layout(tree, ["train"])
    found = {name for name in tree.folders() if tree.folders(name)}
    found.discard(_TRUTH.split("/")[0])
    if labelled and any(_VAL_NAME.fullmatch(name) for name in tree.files("val")):
        found.add("val")
    return tuple(sorted(found))


def _class_folders(tree: SourceTree, split: str) -> Iterator[tuple[str, str, File]]:
    """Class, name and file of every entry of the class folders."""
    unknown = set(tree.folders(split)) - set(tree.folders("train"))
    if unknown:
        raise DataError(
            f"{tree.place(split)}: class folders that train lacks: "
            f"{', '.join(sorted(unknown)[:10])}"
        )
    for name in tree.folders(split):
        for base, file in tree.files(f"{split}/{name}").items():
            yield name, base, file


def _validation(tree: SourceTree) -> Iterator[tuple[str, str, File]]:
    """Class, name and file of the validation pictures, which all lie in one folder."""
    class_of = _wnids(tree)
    try:
        truth = [class_of[int(line)] for line in tree.read(_TRUTH).split()]
    except (KeyError, ValueError) as error:
        raise DataError(f"{tree.place(_TRUTH)}: {error} is no class id of meta.mat") from None
    for base, file in tree.files("val").items():
        match = _VAL_NAME.fullmatch(base)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(truth):
            raise DataError(
                f"{file}: the devkit has {len(truth)} labels and none for this name; "
                "take it out of val"
            )
        yield truth[number - 1], base, file


def _devkit_classes(tree: SourceTree) -> tuple[str, ...]:
    return tuple(sorted(_wnids(tree).values()))


def _wnids(tree: SourceTree) -> dict[int, str]:
    """The WordNet ids of the classes by their ILSVRC2012_ID, 1 to 1000; further ones are groups."""
    from scipy.io import loadmat

    file = tree.file(_META)
    try:
        synsets = loadmat(io.BytesIO(read_bytes(file)), squeeze_me=True)["synsets"]
        rows: Sequence[tuple[int, str]] = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets.ravel()
        ]
    except DataError:
        raise
    except Exception as error:  # scipy's reader raises whatever damaged bytes lead to
        raise DataError(f"{file}: not the devkit's meta.mat ({error})") from None
    return {number: name for number, name in rows if number <= _NUM_CLASSES}


def _warn_strangers(folder: str, strangers: list[str]) -> tuple[str, ...]:
    if not strangers:
        return ()
    return (
        f"{folder}: {len(strangers)} files are no pictures and were left out, first {strangers[0]}",
    )
