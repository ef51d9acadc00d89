"""What a mask says about how it was made: was it interpolated, where do its classes lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.decode import Pixels

_BACKGROUND_NAMES = {"background", "bg", "_background_", "__background__"}
_MIN_STEPS = 20  # fewer changes of class along rows and columns say nothing
_RAMP_SHARE = (
    0.12  # VOC and COCO have at most 0.003, at a tenth of their size 0.08; interpolated 0.3 to 0.8
)


def has_background(class_names: Sequence[str]) -> bool:
    """Whether class 0 is, by its name, what is not an object."""
    return bool(class_names) and class_names[0].lower() in _BACKGROUND_NAMES


@dataclass(frozen=True)
class Steps:
    """How often the id changes between neighbours, and how often it goes on in one direction.

    A ramp is three pixels in a row or column with ids a < b < c or a > b > c. Classes have no
    order, so between two objects an id from between theirs is chance; interpolation puts it there
    nearly always.
    """

    changes: int
    ramps: int

    @property
    def interpolated(self) -> bool:
        """Whether a mask with these steps was interpolated, or compressed with loss."""
        return self.changes >= _MIN_STEPS and self.ramps > _RAMP_SHARE * self.changes


def count_steps(mask: Pixels) -> Steps:
    """Count changes and ramps along the rows and columns of a mask `(H, W)`."""
    changes = ramps = 0
    for ids in (mask, mask.T):
        up, down = ids[:, 1:] > ids[:, :-1], ids[:, 1:] < ids[:, :-1]
        changes += int(np.count_nonzero(up) + np.count_nonzero(down))
        ramps += int(np.count_nonzero(up[:, 1:] & up[:, :-1]))
        ramps += int(np.count_nonzero(down[:, 1:] & down[:, :-1]))
    return Steps(changes, ramps)


def count_frame(mask: Pixels) -> NDArray[np.int64]:
    """Pixels of each id `(256,)` on the outermost rows and columns of a mask `(H, W)`."""
    sides = [mask[0], mask[-1], mask[:, 0], mask[:, -1]]
    return np.bincount(np.concatenate(sides), minlength=256)


def count_regions(mask: Pixels, label: int) -> int:
    """Connected regions of one id (8 neighbours)."""
    return int(cv2.connectedComponents((mask == label).view(np.uint8), connectivity=8)[0]) - 1
