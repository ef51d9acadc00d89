"""What an evaluation leaves for people beside its metrics: predictions, and tables of many classes.

Files of the run directory, each written over by the next evaluation; MLflow gets them at the end.
"""

import csv
import io
import logging
from collections.abc import Callable, Mapping

import cv2
import numpy as np
from torch import Tensor

from data_pipeline.loader import EvalSample
from data_pipeline.palette import voc_palette
from orchestrator.runs.record import Metrics
from orchestrator.runs.run import Run

log = logging.getLogger(__name__)

_SAMPLES, _SIDE = 4, 320  # of a picture of predictions; longer side of each part, in pixels
_MOST_CLASSES = 100  # whose metrics are worth a chart each
_GAP = 4


class Predictions:
    """The first samples of a segmentation with labels and predictions, for a picture."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, sample: EvalSample, prediction: Tensor) -> None:
        """Keep a sample; its label and `prediction` are class ids (H, W)."""
        if len(self._rows) < _SAMPLES:
            image = sample.image.permute(1, 2, 0).numpy()
            labels = [ids.numpy().astype(np.uint8) for ids in (sample.label, prediction)]
            self._rows.append(_row(image, labels))

    def files(self) -> dict[str, bytes]:
        """A PNG: a row for each sample, with image, label, prediction."""
        if not self._rows:
            return {}
        width = max(row.shape[1] for row in self._rows)
        rows = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0))) for row in self._rows]
        _, png = cv2.imencode(".png", cv2.cvtColor(np.concatenate(rows), cv2.COLOR_RGB2BGR))
        return {"predictions/val.png": png.tobytes()}


def _row(image: np.ndarray, labels: list[np.ndarray]) -> np.ndarray:
    height, width = image.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    parts = [cv2.resize(image, size, interpolation=cv2.INTER_AREA)]
    for ids in labels:
        parts.append(voc_palette()[cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)])
    return np.concatenate([np.pad(part, ((0, 0), (0, _GAP), (0, 0))) for part in parts], axis=1)


def split_classes(metrics: Metrics) -> tuple[Metrics, dict[str, bytes]]:
    """The metrics, and as CSV files those (val/NAME/CLASS) of more classes than charts are for."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for name, value in metrics.items():
        _, group, label = [*name.split("/", 2), "", ""][:3]
        if label:
            groups.setdefault(group, []).append((label, value))
    large = {group: rows for group, rows in groups.items() if len(rows) > _MOST_CLASSES}
    rest = {name: value for name, value in metrics.items() if name.split("/", 2)[1] not in large}
    return rest, {f"classes/{group}.csv": _table(group, rows) for group, rows in large.items()}


def _table(group: str, rows: list[tuple[str, float]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("class", group), *rows])
    return text.getvalue().encode()


def keep_artifacts(run: Run, check: Callable[[], None], files: Mapping[str, bytes]) -> None:
    """Write files for people; `check` may forbid it, an OSError is told, not raised."""
    try:
        check()
        for name, content in files.items():
            path = run.artifacts / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        log.warning("%s: not written: %s", run.artifacts, error)
