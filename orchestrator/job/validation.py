"""What is wrong with the values of a job file: a line for each field."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Schema = TypeVar("Schema", bound=BaseModel)

_LIST, _SECTION = "should be a list, such as [1, 2]", "should be a section, which has keys"
_WHEN = "should be a date and time with its zone, such as 2026-12-01T08:00:00+01:00"
_UNKNOWN, _KEY = "unknown key", "the key"
_WORDS = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "datetime_from_date_parsing": _WHEN,
    "datetime_parsing": _WHEN,
    "datetime_type": _WHEN,
    "dict_type": _SECTION,
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "list_type": _LIST,
    "model_attributes_type": _SECTION,
    "model_type": _SECTION,
    "string_pattern_mismatch": "should be of lower-case letters, digits, '.', '_' and '-', at most "
    "63, and begin with a letter or digit",
    "string_type": "should be a text (one that looks like a number or date needs quotes)",
    "tuple_type": _LIST,
}  # pydantic's kinds of errors, in words for people who write YAML


def validate(schema: type[Schema], raw: dict[str, Any]) -> Schema:
    """The values that a file says.

    Raises:
        ValueError: its arguments are lines, one for each field that is wrong.
    """
    try:
        values = schema.model_validate(raw)
    except ValidationError as error:
        raise ValueError(*_describe_all(schema, raw, error.errors())) from None
    if found := list(_taken_as_numbers(raw, values)):
        raise ValueError(*(f"{_dotted(raw, at)}: should be a number" for at in found))
    return values


def _taken_as_numbers(raw: Any, value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a true or false of the file became a 1 or 0."""
    if isinstance(raw, bool):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield at
    elif isinstance(raw, dict):
        for name, inner in raw.items():
            child = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
            yield from _taken_as_numbers(inner, child, (*at, name))
    elif isinstance(raw, list) and isinstance(value, tuple | list):
        for index, (inner, child) in enumerate(zip(raw, value, strict=False)):
            yield from _taken_as_numbers(inner, child, (*at, index))


def _describe_all(schema: type[BaseModel], raw: Any, details: Sequence[Any]) -> Iterator[str]:
    """A line for each field: what each arm of a union says, or the arm that came furthest."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for detail in details:
        text = _describe(schema, detail)
        said = found.setdefault(_place(raw, detail), [])
        if text not in said:
            said.append(text)
    for at, said in found.items():
        if any(at == other[: len(at)] for other in found if at != other):
            continue
        value = "" if said[0].startswith((_UNKNOWN, _KEY)) else _value_at(raw, at)
        wrong = " or ".join(said).replace(" or should be ", " or ")
        yield ": ".join(filter(None, (_dotted(raw, at), value, wrong)))


def _place(raw: Any, detail: Any) -> tuple[Any, ...]:
    """The keys of the file, and list positions, that lead to where an error is."""
    location = tuple(part for part in detail["loc"] if _is_in(raw, detail["loc"], part))
    if detail["type"] == "missing" and location[-1:] != detail["loc"][-1:]:
        return (*location, detail["loc"][-1])
    return (*location, "name") if detail["type"].startswith("union_tag_") else location


def _value_at(raw: Any, location: tuple[Any, ...]) -> str:
    """The value as it is read, if it is a plain one that is there."""
    for part in location:
        try:
            raw = raw[part]
        except (LookupError, TypeError):
            return ""
    if isinstance(raw, dict | list):
        return ""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(raw), repr(raw))


def _describe(schema: type[BaseModel], detail: Any) -> str:
    """What is wrong with one field, and the cure."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        sections = _models_at(schema, detail["loc"][:-1])
        known = sorted({name for section in sections for name in section.model_fields})
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{_UNKNOWN}; {hint}"
    if kind == "missing":
        return "is required"
    if kind.startswith("union_tag_"):
        kinds = [kind for arm in _models_at(schema, detail["loc"]) for kind in _kinds(arm)]
        return _describe_choice(detail["input"].get("name"), kinds)
    if kind == "invalid_key" or detail["loc"][-1:] == ("[key]",):
        return f"{_KEY} {detail['input']!r} should be a text; a number or date needs quotes"
    if kind in _WORDS:
        return _WORDS[kind]
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:].replace(" after validation", "")


def _describe_choice(name: Any, kinds: list[str]) -> str:
    """What to say of a section that comes in several kinds and has a wrong name, or none."""
    choose = f"choose {', '.join(kinds)}"
    if name is None:
        return f"is required; {choose}"
    near = difflib.get_close_matches(str(name).lower(), kinds, 1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}{choose}"


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
