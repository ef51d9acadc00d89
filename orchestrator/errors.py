"""Errors of the orchestrator.

AtrousError
├── JobFileError       a job file (or an override) is not valid
├── CheckpointError    a checkpoint is missing, damaged, or does not fit
├── RunError           a run cannot start: owned by someone, impossible on this cluster
├── StageFailed        training ended with an error
├── NonFiniteError     a loss or gradient is not finite
└── ExportError        a network cannot be exported, or what was written is not the same
"""


class AtrousError(Exception):
    """Base of the errors a user can act on: the message says where, what and the cure."""


class JobFileError(AtrousError):
    """A job file is not valid."""


class CheckpointError(AtrousError):
    """A checkpoint is missing, damaged, or does not fit the network."""


class RunError(AtrousError):
    """A run cannot start."""


class StageFailed(AtrousError):
    """Training of a stage ended with an error."""


class NonFiniteError(AtrousError):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"the {what} of step {step} is not finite")
        self.step = step


class ExportError(AtrousError):
    """A network cannot be exported, or the program that was written is not the same."""
