"""What training changes step by step, and a checkpoint therefore keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.build import Network, parameter_groups
from orchestrator.errors import CheckpointError
from orchestrator.job.config import StageSettings
from orchestrator.training.ema import MovingAverage
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.place import Place


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A network with its optimizer, float16's loss scale and, if asked for, its average."""

    network: Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: MovingAverage | None

    @property
    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The average's state_dict; None where the network's own weights are the result."""
        return self.average.state_dict() if self.average else None

    def optimizer_state(self) -> dict[str, Any]:
        """What a checkpoint keeps in optimizer.pt."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restart_from_network(self) -> None:
        """Take note that other weights were loaded into the network."""
        if self.average:
            self.average.restart()

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Any],
        average: Mapping[str, Tensor] | None,
    ) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is of other parameters, or has no average where one is asked for.
        """
        saved = optimizer_state["optimizer"]
        if _names(saved) != _names(self.optimizer.state_dict()):
            raise CheckpointError(
                "the checkpoint's optimizer is of other parameters, or in other groups; train anew"
            )
        if self.average and average is None:
            raise CheckpointError("ema: the checkpoint has no average; train anew")
        self.network.load_state_dict(weights)
        self.optimizer.load_state_dict(saved)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(optimizer_state["scaler"])
        if self.average and average is not None:
            self.average.load_state_dict(average)


def _names(optimizer: Mapping[str, Any]) -> list[list[str]]:
    return [group["param_names"] for group in optimizer["param_groups"]]


def make_state(network: Network, stage: StageSettings, place: Place) -> TrainState:
    """The state of a network, which lies on its device, before the first step."""
    config = stage.optimizer
    groups = parameter_groups(network, config.weight_decay, config.lr_multipliers)
    return TrainState(
        network=network,
        optimizer=make_optimizer(config, groups),
        scaler=torch.amp.GradScaler(
            place.device.type, enabled=place.autocast_dtype == torch.float16
        ),
        average=MovingAverage(network, stage.ema.decay) if stage.ema else None,
    )
