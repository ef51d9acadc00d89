"""The search space of a sweep: which fields of a stage are tuned, and over which values."""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from orchestrator.job.config import StageSettings
from orchestrator.job.sections import Section

Values = Mapping[str, Any]
"""Dotted field of a stage -> its value."""

# They say which run it is, where and how watchfully it runs, not what comes out of it.
_NOT_TUNED = ("name", "cluster", "checkpoint", "log_every", "max_hours", "max_cost", "deadline")


class Domain(Section):
    """What a field may be: one of choice, uniform, loguniform, quniform, randint, lograndint."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = Field(
        default=None, description="one of these values, which may be whole sections"
    )
    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]")
    loguniform: tuple[float, float] | None = Field(
        default=None, description="[low, high], uniform in the logarithm"
    )
    quniform: tuple[float, float, float] | None = Field(
        default=None, description="[low, high, q]: low, low + q, ... up to high"
    )
    randint: tuple[int, int] | None = Field(
        default=None, description="[low, high], whole numbers, both included"
    )
    lograndint: tuple[int, int] | None = Field(
        default=None, description="as randint, uniform in the logarithm"
    )
    when: dict[str, Any] = Field(
        default={},
        description="other fields of the space and their value (or a list of values) with which "
        "this one is tuned; else it stays as the stage has it",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Domain":
        kinds = [name for name in Domain.model_fields if name != "when" and getattr(self, name)]
        if len(kinds) != 1:
            raise ValueError(
                "give exactly one of choice, uniform, loguniform, quniform, randint, lograndint"
            )
        if self.choice is None:
            low, high, *_ = getattr(self, kinds[0])
            if not low < high:
                raise ValueError(f"{kinds[0]}: {low:g} is not below {high:g}")
            if kinds[0].startswith("log") and low <= 0:
                raise ValueError(f"{kinds[0]}: {low:g}: must be above 0")
        if self.quniform and self.quniform[2] <= 0:
            raise ValueError(f"quniform: q is {self.quniform[2]:g}: must be above 0")
        return self

    @property
    def finite(self) -> tuple[Any, ...] | None:
        """All values, in order; None where there are too many to count."""
        if self.choice is not None:
            return self.choice
        if self.quniform is not None:
            low, high, q = self.quniform
            return tuple(plain(low + i * q) for i in range(int((high - low) / q + 1e-9) + 1))
        whole = self.randint or self.lograndint
        return tuple(range(whole[0], whole[1] + 1)) if whole else None

    def samples(self) -> Iterator[Any]:
        """Values that stand for all: those that a field's limits may refuse."""
        if self.choice is not None:
            yield from self.choice
        elif bounds := self.uniform or self.loguniform:
            yield from bounds
            yield bounds[0] + (bounds[1] - bounds[0]) * 0.381966  # not a whole number
        elif (finite := self.finite) is not None:
            yield from (finite[0], finite[len(finite) // 2], finite[-1])

    def is_active(self, values: Values) -> bool:
        """Whether the field is tuned, the others being as they are."""
        return all(
            name in values and values[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )


Space = dict[str, Domain]


def plain(value: float) -> float | int:
    """A number without the noise of its sum, whole where it is: 0.30000000000000004 is 0.3."""
    rounded = round(value, 12)
    return int(rounded) if rounded == int(rounded) else rounded


def with_values(stage: StageSettings, values: Values) -> StageSettings:
    """The stage with other values of some fields.

    Raises:
        ValidationError: the schema refuses them.
    """
    raw = stage.model_dump(mode="json", exclude_unset=True)
    for path, value in values.items():
        target, parts = raw, split_path(path)
        for name in parts[:-1]:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[parts[-1]] = value
    return StageSettings.model_validate(raw)


def split_path(path: str) -> list[str]:
    """The names of a dotted field; a key of a mapping, the last one, may have dots of its own."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        if any(get_origin(arm) is dict for arm in _arms_at(StageSettings, parts[:count])):
            return [*parts[:count], ".".join(parts[count:])]
    return parts


def check_space(space: Space, stage: StageSettings) -> None:
    """Check names and values against the schema, before anything runs.

    Raises:
        ValueError: names the field, the value and the cure.
    """
    if not space:
        raise ValueError("space: give at least one field to tune, such as optimizer.lr")
    for path, domain in space.items():
        _check_field(path, domain)
        for other, wanted in domain.when.items():
            _check_condition(path, other, wanted, space)
    in_order(space)
    refused = [_refusal(path, value, stage) for path, d in space.items() for value in d.samples()]
    if all(refused):
        raise ValueError(f"space: none of its values goes with the stage: {refused[0]}")


def in_order(space: Space) -> list[str]:
    """The fields, each after those that its `when` names.

    Raises:
        ValueError: they name each other in a circle.
    """
    waiting, ordered = dict(space), list[str]()
    while ready := [name for name, d in waiting.items() if not set(d.when) & set(waiting)]:
        ordered += ready
        for name in ready:
            del waiting[name]
    if waiting:
        raise ValueError(f"space: the `when` of {', '.join(waiting)} name each other, in a circle")
    return ordered


def _check_field(path: str, domain: Domain) -> None:
    parts = split_path(path)
    if parts[0] in _NOT_TUNED:
        raise ValueError(f"space.{path}: {parts[0]} does not change a stage's result; leave it out")
    for count in range(1, len(parts) + 1):
        if not _arms_at(StageSettings, parts[:count]):
            names = sorted(_names(_arms_at(StageSettings, parts[: count - 1])))
            near = difflib.get_close_matches(parts[count - 1], names, 1)
            hint = f"did you mean {'.'.join([*parts[: count - 1], near[0]])}?" if near else ""
            where = ".".join(parts[: count - 1]) or "a stage"
            known = f"{where} has {', '.join(names)}" if names else f"{where} has no fields"
            raise ValueError(f"space.{path}: no such field; {hint or known}")
    for value in domain.samples():
        if why := _not_allowed(_arms_at(StageSettings, parts), value):
            raise ValueError(f"space.{path}: {value!r}: {why}")


def _check_condition(path: str, other: str, wanted: Any, space: Space) -> None:
    if other not in space:
        near = difflib.get_close_matches(other, space, 1)
        hint = f"did you mean {near[0]}?" if near else "it must be a field of the space"
        raise ValueError(f"space.{path}.when: {other} is not tuned; {hint}")
    finite = space[other].finite
    for value in wanted if isinstance(wanted, list) else [wanted]:
        if finite is None or value not in finite:
            raise ValueError(f"space.{path}.when: {other} is never {value!r}")


def _refusal(path: str, value: Any, stage: StageSettings) -> str | None:
    try:
        with_values(stage, {path: value})
    except ValidationError as error:
        return f"{path}={value!r}: {as_text(error)}"
    return None


def as_text(error: ValidationError) -> str:
    """The first thing that the schema refuses, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, first["loc"]))
    return f"{place}{': ' if place else ''}{message[0].lower()}{message[1:]}"


def _not_allowed(arms: Sequence[Any], value: Any) -> str | None:
    """Why no field of these types takes a value; None where one does."""
    reason = ""
    for arm in arms:
        try:
            TypeAdapter(arm).validate_python(value)
        except ValidationError as error:
            reason = reason or as_text(error)
        else:
            return None
    return reason


def _arms_at(schema: Any, parts: Sequence[str]) -> list[Any]:
    """The types that may stand at a path, through unions; a key of a mapping may be any."""
    if not parts:
        return _arms(schema)
    found: list[Any] = []
    for arm in _arms(schema):
        if get_origin(arm) is Annotated:
            arm = get_args(arm)[0]
        if isinstance(arm, type) and issubclass(arm, BaseModel) and parts[0] in arm.model_fields:
            field = arm.model_fields[parts[0]]
            kind: Any = field.annotation
            for limit in field.metadata:
                kind = Annotated[kind, limit]
            found += _arms_at(kind, parts[1:])
        elif get_origin(arm) is dict and len(parts) == 1:
            found += _arms(get_args(arm)[1])
    return found


def _arms(annotation: Any) -> list[Any]:
    """What a type may be: the parts of a union, and with the union's limits where it has some."""
    if get_origin(annotation) is Annotated and _is_union(get_args(annotation)[0]):
        kind, *limits = get_args(annotation)
        return [Annotated[(arm, *limits)] for arm in _arms(kind)]
    if _is_union(annotation):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    return [annotation]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _names(arms: Sequence[Any]) -> set[str]:
    models = [get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms]
    return {
        name
        for model in models
        if isinstance(model, type) and issubclass(model, BaseModel)
        for name in model.model_fields
    }
