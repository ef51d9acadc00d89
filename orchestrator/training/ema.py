"""Exponential moving average of a network's parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """An average beside the parameters of a network; the running statistics stay the network's.

    At step t its decay is min(decay, (1 + t) / (10 + t)), so that it soon forgets where training
    began (TensorFlow's num_updates).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._decay = decay
        self._parameters: dict[str, Tensor] = dict(network.named_parameters())
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, parameters = list(self._averages.values()), list(self._parameters.values())
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    def restart(self) -> None:
        """Begin anew from the network's parameters, which were replaced."""
        self.load_state_dict(self._network.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state_dict with the average in it."""
        return self._network.state_dict() | self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the average from a `state_dict`."""
        for name, average in self._averages.items():
            average.copy_(state[name])

    @contextmanager
    def in_the_network(self) -> Iterator[None]:
        """The network computes with the average inside; no tensor is copied, both change places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            parameter.data, average.data = average.data, parameter.data
