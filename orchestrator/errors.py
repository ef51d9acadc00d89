"""Errors of the orchestrator.

AtrousError
├── JobFileError       a job file (or an override) is not valid
├── CheckpointError    a checkpoint is missing, damaged, or does not fit
├── RunError           a run cannot start: owned by someone, impossible on this cluster
├── RunTakenOver       other workers go on with the run; these must not write any more
├── StageFailed        training ended with an error
├── StageStopped       training was asked to stop, and wrote a checkpoint
├── JobStopped         a limit of the job, or somebody, stopped it; the same command goes on
├── NonFiniteError     a loss or gradient is not finite
└── ExportError        a network cannot be exported, or what was written is not the same
"""


class AtrousError(Exception):
    """Base of the errors a user can act on: the message says where, what and the cure."""

    exit_code = 1  # of a command that ends with it


class JobFileError(AtrousError):
    """A job file is not valid."""

    exit_code = 2


class CheckpointError(AtrousError):
    """A checkpoint is missing, damaged, or does not fit the network."""


class RunError(AtrousError):
    """A run cannot start."""


class RunTakenOver(AtrousError):
    """Other workers go on with the run."""


class StageFailed(AtrousError):
    """Training of a stage ended with an error."""


class StageStopped(AtrousError):
    """Training of a stage was asked to stop, and wrote a checkpoint."""

    def __init__(self, stage: str, step: int, steps: int, why: str) -> None:
        self.reason = f"stopped ({why}) at step {step} of {steps}"
        super().__init__(f"{stage}: {self.reason}")


class JobStopped(AtrousError):
    """A limit of a job is reached, or somebody stopped a stage; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not failed, to be tried again


class NonFiniteError(AtrousError):
    """The loss, the gradient or the weights of a step (from 0) are not finite.

    `here`: known to be so on this worker.
    """

    def __init__(self, step: int, what: str, *, here: bool = False) -> None:
        super().__init__(step, what)
        self.step, self.what, self.here = step, what, here

    def __str__(self) -> str:
        return f"the {self.what} of step {self.step} is not finite"


class ExportError(AtrousError):
    """A network cannot be exported, or the program that was written is not the same."""
