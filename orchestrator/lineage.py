"""The chain of a stage, run or checkpoint back to raw data, read from the storage alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.tree import Tree

from orchestrator.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from orchestrator.errors import CheckpointError
from orchestrator.files import read_json
from orchestrator.runs import Run, all_runs


@dataclass(frozen=True, kw_only=True)
class Link:
    """One stage of a chain."""

    checkpoint: Checkpoint
    run_id: str | None
    parent: "Link | None"
    broken: str | None = None  # why the chain cannot be followed further


def find_checkpoint(target: str, storage: Path) -> Checkpoint:
    """The checkpoint a stage name, run directory, MLflow run id or checkpoint path stands for.

    Raises:
        CheckpointError: nothing of that name.
    """
    path = Path(target).expanduser().absolute()
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
    if parents:
        record = parents[0]
        try:
            earlier = read_checkpoint(Path(record["weights"]).parent, verify=False)
            if earlier.digest == record["digest"]:
                parent = trace(earlier)
            else:
                broken = f"{record['weights']} is no longer {record['digest'][:12]}"
        except CheckpointError as error:
            broken = str(error)
    return Link(checkpoint=checkpoint, run_id=run_id, parent=parent, broken=broken)


def as_tree(link: Link) -> Tree:
    """For the terminal."""
    return _add(None, link)


def _add(tree: Tree | None, link: Link) -> Tree:
    state = link.checkpoint.state
    label = (
        f"[bold]{state['stage']}[/bold] step {state['step']}: {_metrics(state)}\n"
        f"checkpoint {link.checkpoint.path}\n"
        f"weights sha256 {link.checkpoint.digest}\n"
        f"MLflow run {link.run_id or 'not tracked'}"
    )
    node = tree.add(label, highlight=False) if tree else Tree(label, highlight=False)
    for role, data in state["data"].items():
        text = f"{role} data {data['dataset']}/{data['split']}: {data['num_samples']} samples"
        if data["skipped"]:
            text += f" ({data['skipped']} broken inputs left out)"
        branch = node.add(f"{text}, manifest {data['digest']}", highlight=False)
        branch.add(f"raw data: {data['format']} layout in {data['source']}", highlight=False)
    if link.parent:
        take = state["parents"][0]["take"]
        _add(node.add(f"took the {take} of", highlight=False), link.parent)
    elif link.broken:
        node.add(f"[red]chain broken: {link.broken}[/red]")
    else:
        for record in state["parents"]:
            node.add(f"started from {record['weights']} (sha256 {record['digest']})")
        if not state["parents"]:
            node.add("started from scratch (random initialisation)")
    return node


def _metrics(state: Any) -> str:
    headline = {k: v for k, v in state["metrics"].items() if "/iou/" not in k}
    return ", ".join(f"{key} {value:.4f}" for key, value in headline.items())
