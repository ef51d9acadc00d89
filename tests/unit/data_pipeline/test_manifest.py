"""Rows of a manifest with more shards than row groups."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import read_manifest, write_manifest

SHARDS = (2, 3, 1, 4, 2, 3, 1)


@pytest.mark.parametrize(("most", "groups"), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 4), (7, 7)])
def test_several_shards_share_a_row_group(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: int, groups: int
) -> None:
    dataset: Dataset = make_dataset("classification", SHARDS)
    rows = [dataset.manifest.read_rows(shard) for shard in range(len(SHARDS))]
    samples = [dataset.read(*dataset.locate(index)) for index in range(dataset.num_samples)]
    monkeypatch.setattr("data_pipeline.manifest._MAX_ROW_GROUPS", most)
    write_manifest(dataset.place, dataset.manifest, rows)
    assert pq.read_metadata(Path(dataset.place) / "manifest.parquet").num_row_groups == groups
    again = Dataset(read_manifest(dataset.place))
    assert again.manifest.digest == dataset.manifest.digest
    assert [again.manifest.read_rows(shard) for shard in range(len(SHARDS))] == rows
    assert again.manifest.read_rows(3, ["key"]).column_names == ["key"]
    assert [again.read(*again.locate(index)) for index in range(again.num_samples)] == samples


def test_row_groups_of_another_number_are_refused(
    make_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Dataset = make_dataset("classification", SHARDS)
    monkeypatch.setattr("data_pipeline.manifest._MAX_ROW_GROUPS", 3)
    with pytest.raises(DataError, match="header and rows disagree"):
        read_manifest(dataset.place)


def test_the_footer_has_nothing_that_nobody_asks_for(make_dataset: Any) -> None:
    """220,000 column chunks are parsed by every worker of a large run."""
    dataset: Dataset = make_dataset("classification", SHARDS)
    metadata = pq.read_metadata(Path(dataset.place) / "manifest.parquet")
    assert list(metadata.metadata) == [b"atrous"]
    column = metadata.row_group(0).column(1)
    assert column.statistics is None
    assert not column.has_dictionary_page
