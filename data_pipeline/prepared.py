"""Finds the prepared splits at a place."""

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import FILE_NAME, read_manifest
from data_pipeline.storage import Place, join, open_storage


def open_splits(place: Place) -> dict[str, Dataset]:
    """The split at `place`, or every split directly below it, by name.

    Raises:
        DataError: there is none, or one is not a manifest of this version.
    """
    storage = open_storage(place)
    if storage.size(FILE_NAME) is not None:
        dataset = Dataset(read_manifest(place))
        return {dataset.manifest.split: dataset}
    names = [name.split("/") for name in storage.names("")]
    splits = sorted(parts[0] for parts in names if len(parts) == 2 and parts[1] == FILE_NAME)
    if not splits:
        raise DataError(
            f"{place}: no {FILE_NAME} there or one folder below; name the folder that "
            "`atrous data prepare` wrote, or one of its splits"
        )
    return {split: Dataset(read_manifest(join(place, split))) for split in splits}
