"""Job files: YAML to a validated job, or an error that names file, field, value and cure."""

from copy import copy
from pathlib import Path
from typing import Any

from orchestrator.errors import JobFileError
from orchestrator.job.config import Job, PipelineJob, StageJob
from orchestrator.job.sweep import SweepJob
from orchestrator.job.validation import validate
from orchestrator.job.yaml_file import parse_yaml, read_mapping

KINDS: dict[str, type[StageJob] | type[PipelineJob]] = {
    "stage": StageJob,
    "pipeline": PipelineJob,
    "sweep": SweepJob,
}


def load_job(path: Path, overrides: tuple[str, ...] = ()) -> Job:
    """Read and validate a job file; `overrides` are `a.b=value` with a YAML value.

    Raises:
        JobFileError: names the file, the field, the value and the cure.
    """
    raw = read_mapping(path)
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise JobFileError(f"{path}: kind: {kind!r} is not one of {', '.join(KINDS)}")
    if kind != "stage":
        if "task" in raw:
            raise JobFileError(f"{path}: kind: {kind!r} has stages; one with a task is kind: stage")
        _inline_stages(raw, path)
    for override in overrides:
        _apply(raw, override)
    try:
        return validate(KINDS[kind], raw)
    except ValueError as error:
        raise JobFileError("\n".join(f"{path}: {line}" for line in error.args)) from None


def _inline_stages(raw: dict[str, Any], path: Path) -> None:
    """Replace each stage given as a file name by the content of that (complete) stage file."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return  # the schema says what is wrong
    for index, entry in enumerate(stages):
        if not isinstance(entry, str):
            _check_written_out(entry, f"{path}: stages[{index}]")
            continue
        stage_path = path.parent / entry
        try:
            stage = read_mapping(stage_path)
        except JobFileError as error:
            raise JobFileError(f"{path}: stages[{index}]: {error}") from None
        if stage.pop("kind", None) != "stage":
            raise JobFileError(f"{path}: stages[{index}]: {stage_path} is not of kind: stage")
        for place in ("storage", "data_root"):
            stage.pop(place, None)  # a pipeline's stages share the pipeline's places
        datasets, more = raw.get("datasets") or {}, stage.pop("datasets", None) or {}
        if not isinstance(datasets, dict) or not isinstance(more, dict):
            raise JobFileError(f"{path}: datasets, or those of {stage_path}, are not a mapping")
        raw["datasets"] = more | datasets
        stages[index] = stage


def _check_written_out(entry: Any, where: str) -> None:
    if isinstance(entry, dict) and "kind" in entry:
        raise JobFileError(
            f"{where}: kind: {entry['kind']!r}: what is written out here is a stage and has no "
            "kind; leave it out. Sweeps and pipelines run by themselves"
        )


def _apply(raw: dict[str, Any], override: str) -> None:
    field, separator, text = override.partition("=")
    if not separator or not all(field.split(".")):
        raise JobFileError(f"--set {override}: write FIELD=VALUE, for instance optimizer.lr=0.01")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise JobFileError(f"--set {override}: {text!r} is not valid YAML: {error}") from None
    _set(raw, field.split("."), value, override)


def _set(target: Any, names: list[str], value: Any, override: str) -> None:
    """Set a field below `target`; the name * is every item of a list."""
    name, rest = names[0], names[1:]
    keys: list[Any] = [name]
    if isinstance(target, list):
        keys = list(range(len(target))) if name == "*" else [_index(target, name, override)]
    for key in keys:
        if not rest:
            target[key] = value
            continue
        child = target[key] if isinstance(target, list) else target.get(key, {})
        if not isinstance(child, dict | list):
            raise JobFileError(f"--set {override}: {name} is {child!r}, not a section")
        target[key] = copy(child)  # YAML's aliases make one object of several sections
        _set(target[key], rest, value, override)


def _index(items: list[Any], name: str, override: str) -> int:
    """Position of a list item by its number, or of a stage by its name."""
    for index, item in enumerate(items):
        if name == str(index) or (isinstance(item, dict) and item.get("name") == name):
            return index
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    raise JobFileError(f"--set {override}: no item {name!r}; there are {', '.join(names)}, and *")
