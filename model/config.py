"""What a job file says about the network. Light on purpose: nothing here imports torch."""

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Task = Literal["classification", "multilabel", "segmentation"]
OutputStride = Literal[8, 16, 32]


BACKBONES = (
    *("xception41", "xception65", "xception71"),
    *("resnet_v1_50", "resnet_v1_50_beta", "resnet_v1_101", "resnet_v1_101_beta"),
)
_JOINS = (("conv2",), ("conv3", "conv2"))


def _known(backbone: str) -> str:
    if backbone not in BACKBONES and not re.fullmatch(r"timm:[A-Za-z0-9_.]+", backbone):
        near = difflib.get_close_matches(backbone, BACKBONES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{hint}choose {', '.join(BACKBONES)} or timm:NAME")
    return backbone


def _joins(low_level: tuple[str, ...]) -> tuple[str, ...]:
    if low_level not in _JOINS:
        raise ValueError("choose [conv2] or [conv3, conv2]")
    return low_level


class DecoderConfig(BaseModel):
    """The decoder of section 3.1: low-level features reduced, then refined (Tables 1, 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low_level: Annotated[tuple[str, ...], AfterValidator(_joins)] = Field(
        default=("conv2",),
        description="features joined, each at its resolution before striding: [conv2] (stride 4), "
        "or [conv3, conv2] (strides 8, then 4: Table 2's last row)",
    )
    low_level_channels: Annotated[int, Field(ge=1)] = Field(
        default=48, description="to which a 1x1 convolution reduces them (Table 1)"
    )
    channels: Annotated[int, Field(ge=1)] = Field(
        default=256, description="of its refining convolutions (Table 2)"
    )
    kernel_size: Literal[1, 3] = Field(
        default=3, description="of its refining convolutions (Table 2)"
    )
    num_convs: Annotated[int, Field(ge=1, le=3)] = Field(
        default=2, description="refining convolutions after each join"
    )
    separable: bool | None = Field(
        default=None, description="atrous separable convolution; None: as model.separable"
    )


class BatchNormConfig(BaseModel):
    """Batch normalisation; momentum is PyTorch's (1 - decay)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    momentum: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="None: the reference's: 3e-4, but 0.05 in the ResNets it has; timm's own",
    )
    frozen: bool = Field(
        default=False,
        description="use and keep the running statistics; scale and offset still train "
        "(the reference's fine_tune_batch_norm=false)",
    )
    sync: bool = Field(
        default=False, description="statistics over the batches of all workers, not of each alone"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "BatchNormConfig":
        if self.frozen and self.sync:
            raise ValueError("frozen statistics are not synchronised: set frozen or sync, not both")
        return self


class ModelConfig(BaseModel):
    """A network: backbone, and for segmentation ASPP and decoder around it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Annotated[str, AfterValidator(_known)] = Field(
        default="xception65",
        description="xception41, xception65, xception71; resnet_v1_50 or resnet_v1_101 as the "
        "reference has them, with _beta for three 3x3 root convolutions; or timm:NAME",
    )
    width: Annotated[float, Field(gt=0, le=4)] = Field(
        default=1.0, description="factor on every channel count of the Xception"
    )
    middle_units: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="units of the Xception's middle flow; None: 8 (41) or 16 (65, 71)"
    )
    relu_after_depthwise: bool = Field(
        default=False,
        description="Xception: the extra ReLU after every 3x3 depthwise convolution of section "
        "3.2, which the released networks have in their last block only",
    )
    multi_grid: tuple[
        Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
    ] = Field(
        default=(1, 1, 1),
        description="factors on the atrous rates within the last block; (1, 2, 4) in Table 3",
    )
    output_stride: OutputStride | None = Field(
        default=None, description="None: 16 for segmentation, 32 for the other tasks"
    )
    aspp_channels: Annotated[int, Field(ge=1)] = Field(
        default=256, description="of each ASPP branch and of the encoder's output"
    )
    image_level_features: bool = Field(default=True, description="the ASPP branch of image pooling")
    separable: bool = Field(
        default=True, description="atrous separable convolution in ASPP and decoder"
    )
    decoder: DecoderConfig | None = Field(
        default=DecoderConfig(), description="null: naive bilinear upsampling (DeepLabv3)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="None: 0.1 after ASPP, 0.5 before a classifier (the reference's)"
    )
    batch_norm: BatchNormConfig = Field(
        default=BatchNormConfig(), description="how statistics are taken"
    )
