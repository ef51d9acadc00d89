"""The chain of a stage, run or checkpoint back to raw data, read from the storage alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.bucket import storage_path
from orchestrator.errors import CheckpointError
from orchestrator.files import read_json
from orchestrator.runs.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from orchestrator.runs.record import headline
from orchestrator.runs.references import find_reference, is_reference
from orchestrator.runs.run import Run, all_runs, run_directory


@dataclass(frozen=True, kw_only=True)
class Link:
    """One stage of a chain."""

    checkpoint: Checkpoint
    run_id: str | None
    parent: "Link | None"
    broken: str | None = None  # why the chain cannot be followed further


def find_checkpoint(target: str, storage: Path) -> Checkpoint:
    """The checkpoint that a stage, run directory, path, MLflow run id or reference stands for.

    Raises:
        CheckpointError: nothing of that name.
    """
    if is_reference(target):
        return find_reference(target, storage)[0]
    path = storage_path(target)
    if (path / "state.json").exists():
        return read_checkpoint(path)
    for run in all_runs(storage):
        record, tracking = run.read(), read_json(run.tracking) or {}
        if (
            target in (record.get("stage"), run.path.name, tracking.get("run_id"))
            or path == run.path
        ):
            checkpoint = newest_checkpoint(run.checkpoints)
            if checkpoint is not None:
                return checkpoint
    stages = sorted({run.read().get("stage", "?") for run in all_runs(storage)})
    raise CheckpointError(
        f"{target!r}: no stage, run or checkpoint of that name under {storage}; "
        f"stages there: {', '.join(stages) or 'none'}"
    )


def trace(checkpoint: Checkpoint) -> Link:
    """Follow parents; weights whose digest is no longer the recorded one end the chain."""
    parents = checkpoint.state["parents"]
    run_id = (read_json(Run(checkpoint.path.parents[1]).tracking) or {}).get("run_id")
    parent, broken = None, None
    # Of weights from elsewhere there is nothing more to follow.
    if parents and not parents[0].get("origin"):
        record = parents[0]
        try:
            earlier = read_checkpoint(parent_path(record, checkpoint.path.parents[3]), verify=False)
            if earlier.digest == record["digest"]:
                parent = trace(earlier)
            else:
                broken = f"{record['weights']} is no longer {record['digest'][:12]}"
        except CheckpointError as error:
            broken = str(error)
    return Link(checkpoint=checkpoint, run_id=run_id, parent=parent, broken=broken)


def parent_path(record: dict[str, Any], storage: Path) -> Path:
    """Where the checkpoint of a record of `parents` lies: in this storage, else where it was."""
    recorded = storage_path(record["weights"]).parent
    if record["stage"] is None:
        return recorded
    moved = run_directory(storage, record["stage"], record["fingerprint"]).checkpoints
    return moved / recorded.name if moved.exists() else recorded


def as_lines(link: Link) -> list[str]:
    """The chain as text, each stage indented under the one that started from it."""
    state = link.checkpoint.state
    lines = [
        f"{state['stage']} step {state['step']}: {headline(state)}",
        f"  checkpoint {link.checkpoint.path}",
        f"  weights sha256 {link.checkpoint.digest}",
        f"  MLflow run {link.run_id or 'not tracked'}",
    ]
    for role, data in state["data"].items():
        text = f"{data['dataset']}/{data['split']}: {data['num_samples']} samples"
        skipped = f", {data['skipped']} broken inputs left out" if data["skipped"] else ""
        lines.append(f"  {role} data {text}{skipped}, manifest {data['digest']}")
        lines.append(f"    raw data: {data['format']} layout in {data['source']}")
    if link.parent:
        start = state["parents"][0]
        named = f" {start['reference']}," if start.get("reference") else ""
        lines.append(f"  took the {start['take']} of{named}")
        return lines + [f"    {line}" for line in as_lines(link.parent)]
    if link.broken:
        return [*lines, f"  chain broken: {link.broken}"]
    for record in state["parents"]:
        lines.append(f"  started from {_origin(record)} (sha256 {record['digest']})")
    return lines if state["parents"] else [*lines, "  started from scratch (random initialisation)"]


def as_records(link: Link) -> list[dict[str, Any]]:
    """The chain for programs: this stage first, its ancestors after it."""
    state = link.checkpoint.state
    record = {
        "stage": state["stage"],
        "step": state["step"],
        "metrics": state["metrics"],
        "checkpoint": str(link.checkpoint.path),
        "digest": link.checkpoint.digest,
        "fingerprint": state["fingerprint"],
        "data": state["data"],
        "parents": state["parents"],
        "overrides": state.get("overrides"),
        "code": state.get("code"),
        "mlflow_run_id": link.run_id,
        "broken": link.broken,
    }
    return [record, *(as_records(link.parent) if link.parent else [])]


def as_dot(link: Link) -> list[str]:
    """The chain for Graphviz: data sets, stages, and what each took of which."""
    lines = ["digraph lineage {", "  rankdir=LR; node [shape=box, fontname=sans];"]
    for record in as_records(link):
        node = f"{record['stage']}\\nstep {record['step']}\\nsha256 {record['digest'][:12]}"
        own = json.dumps(record["digest"])
        lines.append(f'  {own} [label="{node}"];')
        for role, data in record["data"].items():
            split = json.dumps(f"{data['dataset']}/{data['split']} {data['digest'][:12]}")
            lines.append(f"  {split} [shape=cylinder]; {split} -> {own} [label={role}];")
        for parent in record["parents"]:
            source = json.dumps(parent["digest"])
            lines.append(f'  {source} -> {own} [label="{parent["take"]}"];')
            if not parent.get("stage"):
                lines.append(f"  {source} [label={json.dumps(_origin(parent))}];")
    return [*lines, "}"]


def _origin(parent: dict[str, Any]) -> str:
    return str(parent.get("origin") or parent["weights"])
