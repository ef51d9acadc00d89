"""The schema that editors and `atrous explain` see is the one that job files are read with."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.errors import JobFileError
from orchestrator.job.explain import explain, json_schema

ROOT = Path(__file__).parents[4]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_our_job_files_are_valid_for_editors(path: Path) -> None:
    assert list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text()))) == []


def test_the_schema_is_one() -> None:
    VALIDATOR.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 1), ("global_batch", 0), ("task", "detection")]
)
def test_editors_see_mistakes(field: str, value: Any) -> None:
    job = yaml.safe_load((ROOT / "jobs/finetune_voc.yaml").read_text()) | {field: value}
    assert not VALIDATOR.is_valid(job)


def test_every_field_has_a_description() -> None:
    missing = [
        f"{section}.{name}"
        for section, definition in json_schema()["$defs"].items()
        for name, field in definition.get("properties", {}).items()
        if not field.get("description")
    ]
    assert missing == []


def test_the_schema_in_the_documentation_is_this_one() -> None:
    import json

    written = json.loads((ROOT / "docs/job-file.schema.json").read_text())
    assert written == json_schema(), "run: atrous schema > docs/job-file.schema.json"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_tells_editors_its_schema(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("#!")
    name = second.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / name).resolve() == ROOT / "docs/job-file.schema.json"


def test_fields_and_sections_are_explained() -> None:
    (line,) = explain("schedule.power")
    assert line.startswith("schedule.power: number > 0 (default 0.9): ")
    section = list(explain("stages.model.decoder"))
    assert section[0].startswith("stages.model.decoder: section | null")
    assert any(
        line.startswith("  low_level_channels: integer >= 1 (default 48)") for line in section
    )
    assert any(line.startswith("  format: imagenet |") for line in explain("datasets"))
    assert any(line.startswith("  optimizer: ") for line in explain(""))


def test_a_field_that_does_not_exist() -> None:
    with pytest.raises(JobFileError, match="optimizer has no 'momentun'; did you mean 'momentum'"):
        list(explain("optimizer.momentun"))
