"""What a job file says about the network. Light on purpose: nothing here imports torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["classification", "multilabel", "segmentation"]


class DecoderConfig(BaseModel):
    """The decoder of section 3.1: low-level features reduced, 3x3 convolutions (Tables 1, 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low_level_channels: Annotated[int, Field(ge=1)] = 48
    channels: Annotated[int, Field(ge=1)] = 256
    num_convs: Annotated[int, Field(ge=1, le=3)] = 2


class BatchNormConfig(BaseModel):
    """Batch normalisation; momentum is PyTorch's (1 - decay), None: the reference's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    frozen: bool = False


class ModelConfig(BaseModel):
    """A network: backbone, and for segmentation ASPP and decoder around it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = Field(
        default="xception65",
        pattern=r"^(xception(41|65|71)|timm:[A-Za-z0-9_.]+)$",
        description="xception41, xception65, xception71, or timm:NAME",
    )
    width: Annotated[float, Field(gt=0, le=4)] = Field(
        default=1.0, description="factor on every channel count of the Xception"
    )
    middle_units: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="units of the Xception's middle flow; None: 8 (41) or 16 (65, 71)"
    )
    output_stride: Literal[8, 16, 32] | None = Field(
        default=None, description="None: 16 for segmentation, 32 for the other tasks"
    )
    aspp_channels: Annotated[int, Field(ge=1)] = 256
    image_level_features: bool = True
    separable: bool = Field(
        default=True, description="atrous separable convolution in ASPP and decoder"
    )
    decoder: DecoderConfig | None = Field(
        default=DecoderConfig(), description="null: naive bilinear upsampling (DeepLabv3)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="None: 0.1 after ASPP, 0.5 before a classifier (the reference's)"
    )
    batch_norm: BatchNormConfig = BatchNormConfig()
