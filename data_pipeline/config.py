"""What a job file says about its data. Light on purpose: nothing here imports numpy or OpenCV."""

from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from data_pipeline.storage import is_local, join

Side = Annotated[int, Field(ge=1)]
Crop = Side | tuple[Side, Side]
_Factor = Annotated[float, Field(gt=0, le=16)]
OnBadSample = Literal["fail", "skip"]


def as_size(crop: Crop) -> tuple[int, int]:
    """(height, width) of a crop."""
    return (crop, crop) if isinstance(crop, int) else crop


class TrainData(BaseModel):
    """One split to train on and how its samples are augmented."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="name of a prepared data set under data_root")
    split: str = Field(default="train", description="of the data set")
    crop: Crop = Field(description="side, or [height, width], of the training crop in pixels")
    scale: tuple[_Factor, _Factor] | None = Field(
        default=None, description="segmentation: range of the random scale; None: [0.5, 2.0]"
    )
    scale_step: Annotated[float, Field(ge=0)] = Field(
        default=0.25, description="segmentation: grid of the random scale; 0: continuous"
    )
    area: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(le=1)]] | None = Field(
        default=None,
        description="classification: range of the crop's share of the image; None: 0.08 to 1",
    )
    flip: bool = Field(default=True, description="mirror half of the samples")
    block_size: Annotated[int, Field(ge=1)] = Field(
        default=1, description="samples read together; 1: full shuffle (disk), 64-256: object store"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "TrainData":
        for name, span in (("scale", self.scale), ("area", self.area)):
            if span and span[0] > span[1]:
                raise ValueError(f"{name}: {list(span)} is not [least, most]")
        if self.scale and self.scale_step:
            steps = (self.scale[1] - self.scale[0]) / self.scale_step
            if abs(steps - round(steps)) > 1e-6:
                raise ValueError(
                    f"scale: steps of {self.scale_step:g} (scale_step) from {self.scale[0]:g} do "
                    f"not come to {self.scale[1]:g}; 0 draws any scale"
                )
        return self


class EvalData(BaseModel):
    """One split to evaluate on: whole images, each exactly once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="name of a prepared data set under data_root")
    split: str = Field(default="val", description="of the data set")
    crop: Crop | None = Field(
        default=None,
        description="segmentation: size every image is padded to (None: each to its own k*16+1); "
        "classification: centre crop of 0.875 of the image (None: the training crop)",
    )


class ShardContents(BaseModel):
    """What the samples of WebDataset shards that others wrote consist of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["segmentation", "classification", "multilabel"] = Field(
        description="what the labels are for"
    )
    image: tuple[str, ...] = Field(
        default=("jpg", "jpeg", "png", "webp"),
        min_length=1,
        description="extensions of the picture; the first that a sample has counts",
    )
    label: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="extensions of the label, such as cls, json or json:field (a field of a JSON "
        "object); null: cls; of multilabel json, cls; of segmentation seg.png, mask.png, png",
    )
    classes: str | tuple[str, ...] | Annotated[int, Field(ge=1)] = Field(
        description="names in the order of their ids, a .yaml or .txt file of them, or how many"
    )

    @field_validator("image", "label", mode="before")
    @classmethod
    def _as_extensions(cls, value: object) -> object:
        """A text with commas is a list; a leading dot goes."""
        parts = value.replace(";", ",").split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return parts
        return tuple(p.strip().lstrip(".") if isinstance(p, str) else p for p in parts)


class Shards(ShardContents):
    """WebDataset shards that others wrote, indexed once and read where they lie."""

    splits: dict[str, str | tuple[str, ...]] = Field(
        min_length=1,
        description="shards of each split, below source: files, also with {000..012} or *, or the "
        "folder that holds them",
    )

    def below(self, source: str) -> "Shards":
        """The same with whole places instead of those below `source`."""

        def place(name: str) -> str:
            return join(source, name) if is_local(name) else name

        return self.model_copy(
            update={
                "classes": place(self.classes) if isinstance(self.classes, str) else self.classes,
                "splits": {split: tuple(map(place, names)) for split, names in self.places.items()},
            }
        )

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """The shards of each split."""
        return {
            split: (names,) if isinstance(names, str) else names
            for split, names in self.splits.items()
        }


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

    train: TrainData = Field(description="what is trained on")
    val: EvalData = Field(description="what is evaluated on")
    threads: Annotated[int, Field(ge=1, le=256)] = Field(
        default=4, description="decoding threads of a worker"
    )
    prefetch: Annotated[int, Field(ge=1)] = Field(default=4, description="batches prepared ahead")
    cache: Cache | Literal[False] | None = Field(
        default=None,
        description="shared by all workers of a node; None: for a data_root of s3:// only; "
        "false: never",
    )
    keep_pixels: bool = Field(
        default=False,
        description="segmentation: keep decoded training images in the node's cache (see cache; on "
        "any data_root), if all fit: later epochs do not decode",
    )
    on_bad_sample: OnBadSample = Field(
        default="fail",
        description="training sample that cannot be read or decoded; skip: another replaces it",
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.001,
        description="skip: bad share of an epoch's samples (or 8, if more) that stops the run",
    )
