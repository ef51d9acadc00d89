"""Job files: YAML to a validated job, or an error that names file, field, value and cure."""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import JobFileError
from orchestrator.job.config import Job, PipelineJob, StageJob

KINDS: dict[str, type[StageJob] | type[PipelineJob]] = {"stage": StageJob, "pipeline": PipelineJob}


def load_job(path: Path, overrides: tuple[str, ...] = ()) -> Job:
    """Read and validate a job file; `overrides` are `a.b=value` with a YAML value.

    Raises:
        JobFileError: names the file, the field, the value and the cure.
    """
    raw = _read_yaml(path)
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise JobFileError(f"{path}: kind: {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "pipeline":
        _inline_stages(raw, path)
    for override in overrides:
        _apply(raw, override)
    schema = KINDS[kind]
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(schema, raw, detail) for detail in error.errors()]
        raise JobFileError("\n".join(f"{path}: {line}" for line in lines)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise JobFileError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise JobFileError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise JobFileError(f"{path}: a job file is a mapping that starts with kind: stage|pipeline")
    return raw


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[object] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


def _inline_stages(raw: dict[str, Any], path: Path) -> None:
    """Replace each stage given as a file name by the content of that (complete) stage file."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return  # the schema says what is wrong
    for index, entry in enumerate(stages):
        if not isinstance(entry, str):
            continue
        stage_path = path.parent / entry
        stage = _read_yaml(stage_path)
        if stage.pop("kind", None) != "stage":
            raise JobFileError(f"{path}: stages[{index}]: {stage_path} is not of kind: stage")
        for place in ("storage", "data_root"):
            stage.pop(place, None)  # a pipeline's stages share the pipeline's places
        stages[index] = stage


def _apply(raw: dict[str, Any], override: str) -> None:
    field, separator, text = override.partition("=")
    if not separator or not field:
        raise JobFileError(f"--set {override}: write FIELD=VALUE, for instance optimizer.lr=0.01")
    *parents, last = field.split(".")
    target: Any = raw
    for name in parents:
        target = _child(target, name, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobFileError(f"--set {override}: {text!r} is not valid YAML: {error}") from None
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    else:
        target[last] = value


def _child(target: Any, name: str, override: str) -> Any:
    child = (
        target[_index(target, name, override)]
        if isinstance(target, list)
        else target.setdefault(name, {})
    )
    if not isinstance(child, dict | list):
        raise JobFileError(f"--set {override}: {name} is {child!r}, not a section")
    return child


def _index(items: list[Any], name: str, override: str) -> int:
    """Position of a list item by its number, or of a stage by its name."""
    for index, item in enumerate(items):
        if name == str(index) or (isinstance(item, dict) and item.get("name") == name):
            return index
    raise JobFileError(f"--set {override}: no item {name!r} in the list")


def _describe(schema: type[BaseModel], raw: Any, detail: Any) -> str:
    """One line for one pydantic error: field, value, cure."""
    location = tuple(part for part in detail["loc"] if _is_in(raw, detail["loc"], part))
    field = _dotted(raw, location) or "(top level)"
    kind = detail["type"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        sections = _models_at(schema, detail["loc"][:-1])
        known = sorted({name for section in sections for name in section.model_fields})
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if kind == "missing":
        if location[-1:] != detail["loc"][-1:]:
            location += detail["loc"][-1:]
        return f"{_dotted(raw, location)}: is required"
    if kind.startswith("union_tag_"):
        kinds = [kind for arm in _models_at(schema, detail["loc"]) for kind in _kinds(arm)]
        return _describe_choice(field, detail["input"].get("name"), kinds)
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    value = detail["input"]
    if isinstance(value, dict | list | BaseModel):
        return f"{field}: {message}"
    return f"{field}: {value!r}: {message}"


def _describe_choice(field: str, name: Any, kinds: list[str]) -> str:
    """One line for a section that comes in several kinds and has a wrong name, or none."""
    if name is None:
        return f"{field}.name: is required; choose {', '.join(kinds)}"
    near = difflib.get_close_matches(str(name), kinds, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{field}.name: {name!r}: {hint}choose {', '.join(kinds)}"


def _is_in(raw: Any, location: tuple[Any, ...], part: Any) -> bool:
    """Whether `part` of a pydantic location is a key of the file, not the name of a union's arm."""
    value = raw
    for name in location[: location.index(part)]:
        if (isinstance(value, dict) and name in value) or (
            isinstance(value, list) and isinstance(name, int)
        ):
            value = value[name]
    return (isinstance(value, dict) and part in value) or (
        isinstance(value, list) and isinstance(part, int)
    )


def _dotted(raw: Any, location: tuple[Any, ...]) -> str:
    """`stages[2] (finetune-voc).optimizer.lr`."""
    text, value = "", raw
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
        if isinstance(value, list):
            value = value[part] if part < len(value) else None  # an item that is missing
        elif isinstance(value, dict):
            value = value.get(part)
        if isinstance(part, int) and isinstance(value, dict) and "name" in value:
            text += f" ({value['name']})"
    return text


def _models_at(schema: Any, location: tuple[Any, ...]) -> list[type[BaseModel]]:
    """The sections that may stand there; follows field names, list items and union arms."""
    if not location:
        return _models(schema)
    part, rest = location[0], location[1:]
    for candidate in _models(schema):
        if part in candidate.model_fields:
            return _models_at(candidate.model_fields[part].annotation, rest)
        if part in _kinds(candidate):
            return _models_at(candidate, rest)
    return _models_at(schema, rest)


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    """The values of `name` that say that a section is this one."""
    name = section.model_fields.get("name")
    return get_args(name.annotation) if name and get_origin(name.annotation) is Literal else ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model class inside a (possibly nested) annotation."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models(argument)]
