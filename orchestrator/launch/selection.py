"""Which stages of a job run, and why one that ran before would run again."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import JobFileError
from orchestrator.job.config import Job, PipelineJob, StageSettings
from orchestrator.job.sweep import SweepJob
from orchestrator.launch.stage import PlannedStage, fingerprinted
from orchestrator.runs.record import flatten
from orchestrator.runs.run import Run


def select(job: Job, only: Sequence[str] = (), start_at: str | None = None) -> Job:
    """The pipeline with the named stages alone, or with one and all that start from it.

    What these start from and is not among them is the newest finished run of that stage.

    Raises:
        JobFileError: no stage of that name; names the nearest.
    """
    if not isinstance(job, PipelineJob) or isinstance(job, SweepJob):
        if only or start_at:
            raise JobFileError(f"--only and --from are for pipelines; {job.name} is a {job.kind}")
        return job
    if not only and start_at is None:
        return job
    names = [stage.name for stage in job.stages]
    for name in (*only, *([start_at] if start_at else ())):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise JobFileError(f"no stage {name!r}; {hint}the stages are {', '.join(names)}")
    chosen = set(only) if only else set(names)
    if start_at:
        chosen &= _descendants(job.stages, start_at)
    stages = tuple(stage for stage in job.stages if stage.name in chosen)
    used = {part.dataset for stage in stages for part in (stage.data.train, stage.data.val)}
    datasets = {name: one for name, one in job.datasets.items() if name in used}
    return job.model_copy(update={"stages": stages, "datasets": datasets})


def _descendants(stages: Sequence[StageSettings], first: str) -> set[str]:
    found = {first}
    while more := {
        stage.name
        for stage in stages
        if stage.start_from and stage.start_from.checkpoint in found and stage.name not in found
    }:
        found |= more
    return found


def why(planned: PlannedStage, runs: Sequence[Run]) -> Iterator[str]:
    """What differs from the newest earlier run of the stage; nothing where it never ran.

    `runs` are newest first.
    """
    earlier = next((r for r in runs if r.read().get("stage") == planned.stage.name), None)
    if earlier is None:
        return
    record = earlier.read()
    if record["fingerprint"] == planned.fingerprint:
        yield f"the same as {earlier.path.name}, which is {record['status']}"
        return
    yield f"differs from {earlier.path.name}:"
    before = _inputs(
        StageSettings.model_validate(record["job"]),
        {role: data["digest"] for role, data in record["data"].items()},
        (record.get("start") or {}).get("digest"),
    )
    now = _inputs(
        planned.stage,
        {"train": planned.train.manifest.digest, "val": planned.val.manifest.digest},
        planned.start.digest if planned.start else None,
    )
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield f"  {name}: {before.get(name)} -> {now.get(name)}"


def _inputs(stage: StageSettings, data: Mapping[str, str], start: str | None) -> dict[str, Any]:
    """All that a result depends on, by name."""
    digests = {f"data.{role} (manifest)": digest[:12] for role, digest in data.items()}
    weights = {"start_from (sha256)": start[:12] if start else "scratch"}
    return dict(flatten(fingerprinted(stage))) | digests | weights
