"""What a job file says about its data. Light on purpose: nothing here imports numpy or OpenCV."""

from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

Side = Annotated[int, Field(ge=1)]
Crop = Side | tuple[Side, Side]
OnBadSample = Literal["fail", "skip"]


def as_size(crop: Crop) -> tuple[int, int]:
    """(height, width) of a crop."""
    return (crop, crop) if isinstance(crop, int) else crop


class TrainData(BaseModel):
    """One split to train on and how its samples are augmented."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="name of a prepared data set under data_root")
    split: str = "train"
    crop: Crop = Field(description="side, or [height, width], of the training crop in pixels")
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="segmentation: range of the random scale; None: [0.5, 2.0]"
    )
    scale_step: Annotated[float, Field(ge=0)] = Field(
        default=0.25, description="segmentation: grid of the random scale; 0: continuous"
    )
    area: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(le=1)]] | None = Field(
        default=None,
        description="classification: range of the crop's share of the image; None: 0.08 to 1",
    )
    flip: bool = True
    block_size: Annotated[int, Field(ge=1)] = Field(
        default=1, description="samples read together; 1: full shuffle (disk), 64-256: object store"
    )


class EvalData(BaseModel):
    """One split to evaluate on: whole images, each exactly once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    split: str = "val"
    crop: Crop | None = Field(
        default=None,
        description="segmentation: size every image is padded to (None: each to its own k*16+1); "
        "classification: centre crop of 0.875 of the image (None: the training crop)",
    )


class Cache(BaseModel):
    """A directory of each node that keeps what was read from a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str | None = Field(
        default=None, description="None: $ATROUS_CACHE, else below the system's temporary directory"
    )
    size: Annotated[ByteSize, Field(gt=0)] | None = Field(
        default=None, description='such as "200 GB"; None: 50 GB, or a quarter of what is free'
    )


class DataConfig(BaseModel):
    """Where a stage's samples come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: TrainData
    val: EvalData
    threads: Annotated[int, Field(ge=1)] = Field(
        default=4, description="decoding threads of a worker"
    )
    prefetch: Annotated[int, Field(ge=1)] = Field(default=4, description="batches prepared ahead")
    cache: Cache | Literal[False] | None = Field(
        default=None,
        description="shared by all workers of a node; None: for a data_root of s3:// only; "
        "false: never",
    )
    on_bad_sample: OnBadSample = Field(
        default="fail",
        description="training sample that cannot be read or decoded; skip: another replaces it",
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.001,
        description="skip: bad share of an epoch's samples (or 8, if more) that stops the run",
    )
