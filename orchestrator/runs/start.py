"""Where a stage's weights come from: resolved to one checkpoint with its digest, then handed over.

The order that `training.worker` follows: the run's own newest valid checkpoint, the checkpoint that
start_from names, random initialisation.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.bucket import BucketPath, storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import local_copy, sha256
from orchestrator.job.config import StageSettings
from orchestrator.job.sections import StartFrom
from orchestrator.runs.checkpoint import (
    WEIGHTS,
    Checkpoint,
    best_checkpoint,
    checkpoint_paths,
    newest_checkpoint,
    read_checkpoint,
)
from orchestrator.runs.foreign import fetch_weights, is_foreign
from orchestrator.runs.references import find_reference, is_reference
from orchestrator.runs.run import Run, all_runs

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class Start:
    """A resolved start_from: recorded in the run, its fingerprint and its checkpoints."""

    weights: str  # path of the safetensors file
    digest: str  # sha256 of that file
    take: Literal["backbone", "network"]
    stage: str | None = None
    step: int | None = None
    fingerprint: str | None = None
    class_names: tuple[str, ...] | None = None
    origin: str | None = None  # where weights that are no checkpoint of ours came from
    reference: str | None = None  # MLflow's lasting name of it, where the job file gave one

    @property
    def place(self) -> str:
        """Where the weights come from, as the user named it."""
        return self.origin or self.reference or self.weights

    def file(self) -> Path:
        """The weights on this machine.

        Raises:
            CheckpointError: they changed since they were resolved.
        """
        path = storage_path(self.weights)
        try:
            return local_copy(path, self.digest)
        except ValueError:
            raise CheckpointError(
                f"{path}: changed since the run was planned; start it again"
            ) from None

    def as_json(self) -> dict[str, Any]:
        """For run.json and state.json."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Start":
        """Back from `as_json`."""
        names = record["class_names"]
        return Start(**{**record, "class_names": tuple(names) if names is not None else None})


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """Which tensors a network takes from a checkpoint."""

    taken: Mapping[str, str]  # name in the network -> name in the checkpoint
    left_out: tuple[str, ...]  # in the checkpoint, not taken
    fresh: tuple[str, ...]  # in the network, stay initialised

    @property
    def renamed(self) -> dict[str, str]:
        """Taken tensors whose name differs, network name -> checkpoint name."""
        return {name: source for name, source in self.taken.items() if name != source}

    def report(self) -> str:
        """One line, with the tops of the names."""
        return (
            f"{len(self.taken)} tensors taken ({_tops(self.taken)}), {len(self.renamed)} renamed, "
            f"{len(self.left_out)} left out ({_tops(self.left_out)}), "
            f"{len(self.fresh)} initialised ({_tops(self.fresh)})"
        )


def _tops(names: Mapping[str, str] | Sequence[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names})) or "-"


def resolve_start(
    stage: StageSettings, storage: Path, results: Mapping[str, Checkpoint]
) -> Start | None:
    """The checkpoint a stage starts from, or None for random initialisation.

    `results` are the checkpoints of the stages of the same job; a name that is not among them is
    the newest finished run of that stage in the storage.

    Raises:
        CheckpointError: nothing of that name, not finished, or damaged.
    """
    wanted = stage.start_from
    if wanted is None:
        return None
    place, path = wanted.checkpoint, storage_path(wanted.checkpoint)
    if place in results and wanted.which == "last":
        return _start(results[place], wanted, stage.task)
    if place in results:
        return _from_run(results[place].path.parent, wanted, stage.task)
    outside = is_foreign(place) or is_reference(place)
    single = outside or ("/" in place and (path / WEIGHTS).exists())
    if single and wanted.which == "best":
        raise CheckpointError(
            f"start_from: which: best: {place} is one checkpoint, not a stage or its directory of "
            "them; leave which out"
        )
    if is_foreign(place):
        return _from_elsewhere(stage, wanted, storage)
    if is_reference(place):
        return _from_reference(stage, wanted, storage)
    if "/" in place:
        return _start(read_checkpoint(path), wanted, None) if single else _from_run(path, wanted)
    return _from_stage(stage, wanted, storage)


def _from_reference(stage: StageSettings, wanted: StartFrom, storage: Path) -> Start:
    try:
        checkpoint, lasting = find_reference(wanted.checkpoint, storage)
    except CheckpointError as error:
        raise CheckpointError(f"start_from: {error}") from None
    return replace(_start(checkpoint, wanted, stage.task), reference=lasting)


def _from_elsewhere(stage: StageSettings, wanted: StartFrom, storage: Path) -> Start:
    weights = fetch_weights(wanted.checkpoint, stage.model, stage.task, storage)
    # In a bucket it has its sha256 as its name.
    digest = weights.stem if isinstance(weights, BucketPath) else sha256(weights)
    file = local_copy(weights, digest)
    # Ours, or a TensorFlow one under our names, and with its head; others fit as backbones.
    whole = any(name.endswith("aspp.branch0.conv.weight") for name in read_shapes(file))
    return Start(
        weights=str(weights),
        digest=digest,
        take=wanted.take or ("network" if whole else "backbone"),
        origin=wanted.checkpoint,
    )


def _from_run(directory: Path, wanted: StartFrom, task: str | None = None) -> Start:
    """The last valid checkpoint of a run, or among its checkpoints, or the best."""
    below = Run(directory).checkpoints
    if not checkpoint_paths(directory) and checkpoint_paths(below):
        directory = below
    if wanted.which == "best":
        settings = Run(directory.parent).read().get("job", {}).get("checkpoint", {})
        if not settings.get("keep_best"):
            raise CheckpointError(
                f"start_from: which: best: {directory} has the newest checkpoints only "
                "(checkpoint.keep_best: 0); name one of them by its path, or train the stage anew "
                "with checkpoint.keep_best: 1"
            )
        checkpoint = best_checkpoint(directory)
    else:
        checkpoint = newest_checkpoint(directory)
    if checkpoint is None:
        raise CheckpointError(
            f"start_from: {wanted.checkpoint}: holds no valid checkpoint; name a run's directory, "
            "or one of its checkpoints (RUN/checkpoints/step-NNNNNNNN)"
        )
    return _start(checkpoint, wanted, task)


def _from_stage(stage: StageSettings, wanted: StartFrom, storage: Path) -> Start:
    """The last checkpoint of the newest finished run of an earlier stage."""
    known = {}
    for run in reversed(all_runs(storage)):
        record = run.read()
        if record.get("status") == "finished":
            known[record["stage"]] = run
    if wanted.checkpoint not in known:
        near = difflib.get_close_matches(wanted.checkpoint, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; run its job file first"
        raise CheckpointError(
            f"start_from: {wanted.checkpoint!r}: no finished run of it under {storage}{hint}"
        )
    return _from_run(known[wanted.checkpoint].checkpoints, wanted, stage.task)


def _start(checkpoint: Checkpoint, wanted: StartFrom, task: str | None) -> Start:
    state = checkpoint.state
    same_task = task is None or state["task"] == task
    return Start(
        weights=str(checkpoint.result),
        digest=checkpoint.digest,
        take=wanted.take or ("network" if same_task else "backbone"),
        stage=state["stage"],
        step=state["step"],
        fingerprint=state["fingerprint"],
        class_names=tuple(state["class_names"]),
    )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        CheckpointError: not a safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None


def plan_hand_over(
    network: Shapes, checkpoint: Shapes, start: Start, class_names: Sequence[str]
) -> HandOver:
    """Decide which tensors a network takes: the backbone, or everything but foreign class layers.

    Layers whose rows are classes (logits, classifier) are taken only where class names are equal.
    A part that is wanted must fit as a whole.

    Raises:
        CheckpointError: a wanted tensor is missing or of another shape, or nothing fits.
    """
    same_classes = start.class_names is not None and start.class_names == tuple(class_names)
    class_layers = () if same_classes else ("logits.", "classifier.")
    parts = ("backbone.",) if start.take == "backbone" else ("",)
    source_of = _match_names(network, checkpoint)
    # A count of PyTorch's that other formats, and its own old files, have not.
    network = {n: s for n, s in network.items() if n in source_of or not n.endswith(_COUNTER)}
    wanted = [n for n in network if n.startswith(parts) and not n.startswith(class_layers)]
    taken = {name: source_of[name] for name in wanted if name in source_of}
    if not taken:
        raise CheckpointError(
            f"{start.place}: nothing fits: it has {_tops(list(checkpoint))}, "
            f"the network has {_tops(list(network))}"
        )
    wrong = [
        f"{name}: {'missing' if name not in taken else f'{checkpoint[taken[name]]} there'}, "
        f"{network[name]} here"
        for name in wanted
        if name not in taken or checkpoint[taken[name]] != network[name]
    ]
    if wrong:
        cure = "; start_from: {take: backbone} takes less" if start.take == "network" else ""
        raise CheckpointError(
            f"{start.place} does not fit: {len(wrong)} of {len(wanted)} tensors differ, "
            f"such as {'; '.join(wrong[:3])}{cure}"
        )
    used = set(taken.values())
    return HandOver(
        taken=taken,
        left_out=tuple(name for name in checkpoint if name not in used),
        fresh=tuple(name for name in network if name not in taken),
    )


def _match_names(network: Shapes, checkpoint: Shapes) -> dict[str, str]:
    """Network name -> checkpoint name, under the naming that matches most names.

    Foreign files may be a bare backbone, have timm's names, and have any prefix before all of them
    ("module.", "_orig_mod.", "encoder."). timm joins the levels of a name with dots or underscores.
    """
    from model.importers import timm_names

    flat = {name.replace(".", "_"): name for name in checkpoint}
    bare = {n: n.removeprefix("backbone.") for n in network if n.startswith("backbone.")}
    best: dict[str, str] = {}
    for naming in ({n: n for n in network}, bare, timm_names(network)):
        foreign = {own: name.replace(".", "_") for own, name in naming.items()}
        first = next(iter(foreign.values()), "")
        ends = {name.removesuffix(first) for name in flat if name.endswith(f"_{first}")}
        for prefix in ("", *sorted(ends)):
            found = {
                own: flat[prefix + name] for own, name in foreign.items() if prefix + name in flat
            }
            best = max(best, found, key=len)
    return best


def apply_hand_over(
    network: "torch.nn.Module", start: Start, class_names: Sequence[str]
) -> HandOver:
    """Load the planned tensors into `network`, after checking the file's digest.

    Raises:
        CheckpointError: the file changed since it was resolved, or does not fit.
    """
    import torch
    from safetensors.torch import load_file

    file = start.file()
    if sha256(file) != start.digest:
        raise CheckpointError(f"{start.weights}: changed since the run was planned; start it again")
    source = load_file(file)
    own = network.state_dict()
    plan = plan_hand_over(
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        {name: tuple(tensor.shape) for name, tensor in source.items()},
        start,
        class_names,
    )
    taken = {name: source[key] for name, key in plan.taken.items()}
    for name, tensor in taken.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{start.place}: {name} has values that are not finite: the "
                "weights are damaged, or their training diverged"
            )
    network.load_state_dict(taken, strict=False)
    return plan
