"""The schema of job files, for editors and for people."""

import difflib
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import JobFileError
from orchestrator.job.job_file import KINDS

Schema = dict[str, Any]


def json_schema() -> Schema:
    """JSON Schema of job files of every kind, with the short forms that YAML may use."""
    from pydantic import TypeAdapter

    adapters = [(kind, "validation", TypeAdapter(model)) for kind, model in KINDS.items()]
    found, schema = TypeAdapter.json_schemas(adapters, title="Atrous job file")  # type: ignore[arg-type]
    definitions = schema["$defs"]
    of_kind = [{**found[kind, "validation"]} for kind in KINDS]
    for stage in (definitions["StageSettings"], definitions["StageJob"]):
        fields = stage["properties"]
        fields["start_from"]["anyOf"].append({"type": "string"})
        fields["optimizer"] = {**fields["optimizer"], "anyOf": fields["optimizer"].pop("oneOf")}
    stages = definitions["PipelineJob"]["properties"]["stages"]
    stages["items"] = {"anyOf": [stages["items"], {"type": "string"}]}
    return {**schema, "$schema": "https://json-schema.org/draft/2020-12/schema", "oneOf": of_kind}


def explain(field: str) -> Iterator[str]:
    """Lines that tell of a field (`optimizer.lr`) or section, or of everything for "".

    Raises:
        JobFileError: no such field; names the nearest.
    """
    whole = json_schema()
    nodes = [whole]
    done: list[str] = []
    for name in filter(None, field.split(".")):
        found = [child for node in nodes for child in _children(node, whole).get(name, [])]
        if not found:
            names = sorted({child for node in nodes for child in _children(node, whole)})
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            where = ".".join(done) or "a job file"
            raise JobFileError(f"{field}: {where} has no {name!r}; {hint}it has {', '.join(names)}")
        nodes = found
        done.append(name)
    seen = []
    for node in nodes:
        for line in _describe(node, field, whole):
            if line not in seen:
                seen.append(line)
                yield line


def _describe(node: Schema, field: str, whole: Schema) -> Iterator[str]:
    about = node.get("description", "")
    default = f" (default {_brief(node['default'])})" if "default" in node else ""
    kind = _kind(node, whole)
    if field:
        yield f"{field}: {kind}{default}" + (f": {about}" if about else "")
    for name, children in _children(node, whole).items():
        for child in children:
            text = child.get("description") or _section_text(child, whole)
            default = f" (default {_brief(child['default'])})" if "default" in child else ""
            yield f"  {name}: {_kind(child, whole)}{default}" + (f": {text}" if text else "")


def _section_text(node: Schema, whole: Schema) -> str:
    return next((one.get("description", "") for one in _alternatives(node, whole)), "")


def _alternatives(node: Schema, whole: Schema) -> Iterator[Schema]:
    """The node itself, or all that it may be."""
    if "$ref" in node:
        yield from _alternatives(whole["$defs"][node["$ref"].rpartition("/")[2]], whole)
    elif "anyOf" in node or "oneOf" in node:
        for one in node["anyOf"] if "anyOf" in node else node["oneOf"]:
            yield from _alternatives(one, whole)
    else:
        yield node


def _children(node: Schema, whole: Schema) -> dict[str, list[Schema]]:
    """Fields of a section; of a list of sections, or a mapping to them, those of its items."""
    found: dict[str, list[Schema]] = {}
    for one in _alternatives(node, whole):
        for name, child in one.get("properties", {}).items():
            if child not in found.setdefault(name, []):
                found[name].append(child)
        for inner in (one.get("items"), *one.get("patternProperties", {}).values()):
            for name, children in (_children(inner, whole) if inner else {}).items():
                found.setdefault(name, []).extend(children)
    return found


def _kind(node: Schema, whole: Schema) -> str:
    return " | ".join(dict.fromkeys(_kind_of(one) for one in _alternatives(node, whole)))


def _kind_of(one: Schema) -> str:
    if "const" in one:
        return str(one["const"])
    if "enum" in one:
        return " | ".join(map(str, one["enum"]))
    if "properties" in one:
        return "section"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {one[name]:g}" for name, sign in bounds.items() if name in one]
    names = {"array": "list", "object": "mapping", "null": "null", "boolean": "true or false"}
    kind = str(names.get(one.get("type", ""), one.get("type", "anything")))
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _brief(value: Any) -> str:
    import json

    text = json.dumps(value)
    return text if len(text) <= 60 else "as its fields"
