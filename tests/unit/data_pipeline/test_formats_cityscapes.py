from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.formats import cityscapes

# helpers/labels.py of cityscapesScripts, labelId -> trainId, for the ids that count
OFFICIAL = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def add(source: Path, part: str, kind: str, name: str, ids: np.ndarray) -> None:
    city = name.split("_")[0]
    for path, pixels in (
        (f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", np.zeros((*ids.shape, 3), np.uint8)),
        (f"{kind}/{part}/{city}/{name}_{kind}_labelIds.png", ids),
    ):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(source / path), pixels)


def loaded_mask(split, index: int = 0) -> np.ndarray:
    label = split.load(split.items[index]).label
    return cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)


def test_label_ids_become_train_ids(tmp_path):
    ids = np.arange(34, dtype=np.uint8)
    ids = np.append(ids, np.uint8(255)).reshape(5, 7)
    add(tmp_path, "val", "gtFine", "ulm_000000_000019", ids)
    split = cityscapes.read_split(tmp_path, "val")
    wanted = [OFFICIAL.get(int(i), 255) for i in ids.ravel()]
    assert loaded_mask(split).ravel().tolist() == wanted
    assert split.load(split.items[0]).labels == tuple(range(19))
    assert len(split.class_names) == 19
    assert (split.class_names[0], split.class_names[13], split.class_names[18]) == (
        "road",
        "car",
        "bicycle",
    )


def test_the_coarse_splits_are_fine_train_and_coarse_extra(tmp_path):
    add(tmp_path, "train", "gtFine", "ulm_000000_000019", np.full((4, 6), 7, np.uint8))
    add(tmp_path, "train", "gtCoarse", "ulm_000000_000019", np.full((4, 6), 8, np.uint8))
    add(tmp_path, "train_extra", "gtCoarse", "bonn_000001_000019", np.full((4, 6), 11, np.uint8))
    assert cityscapes.splits(tmp_path) == ("train", "train_extra", "train_coarse")
    add(tmp_path, "val", "gtFine", "jena_000000_000019", np.full((4, 6), 12, np.uint8))
    assert len(cityscapes.splits(tmp_path)) == 6
    split = cityscapes.read_split(tmp_path, "trainval_coarse")
    assert [item.key.split("_")[0] for item in split.items] == ["ulm", "jena", "bonn"]
    assert [int(loaded_mask(split, i)[0, 0]) for i in range(3)] == [0, 3, 2]
    counts = {
        name: cityscapes.read_split(tmp_path, name).expected_count
        for name in cityscapes.splits(tmp_path)
    }
    assert counts["train_coarse"] == counts["train"] + counts["train_extra"] == 22973
    assert counts["trainval_coarse"] == counts["trainval"] + counts["train_extra"] == 23473


def test_unknown_ids_and_missing_masks_are_named(tmp_path):
    add(tmp_path, "val", "gtFine", "ulm_000000_000019", np.full((4, 6), 34, np.uint8))
    split = cityscapes.read_split(tmp_path, "val")
    with pytest.raises(DataError, match=r"unknown labelIds \[34\]; known: -1\.\.33"):
        split.load(split.items[0])
    Path(split.items[0].files[1]).unlink()
    with pytest.raises(DataError, match=r"gtFine_labelIds\.png: No such file"):
        split.load(split.items[0])


def test_a_wrong_layout_is_named(tmp_path):
    with pytest.raises(DataError, match="missing leftImg8bit; found: nothing"):
        cityscapes.splits(tmp_path)
