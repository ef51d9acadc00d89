"""YAML as job files use it: plain values as YAML 1.2 reads them, no key twice, errors in a line."""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import JobFileError

# Beginning of a problem in PyYAML's words -> its cure.
_CURES = {
    "found character '\\t'": "indent with spaces, not with tabs",
    "could not find expected ':'": "a key needs a colon and a space behind it",
    "mapping values are not allowed": "a key is indented deeper than those beside it, or a text "
    "with a colon needs quotes",
    "expected <block end>": "a line is indented other than those beside it",
    "found unhashable key": "a text that begins with { or [ needs quotes",
    "could not determine a constructor": "tags (!name) have no meaning here",
    "found undefined alias": "*name needs &name above it, or quotes if it is a text",
    "but found another document": "one job to a file",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which the second would silently count.

    And without the traps of YAML 1.1, where 1e-4 is a text, 010 is 8, no is false and 1:30 is 90.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
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


for _tag, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?((\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)(e[-+]?[0-9]+)?|\.inf)|\.nan",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$", re.IGNORECASE), list(_first)
    )


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: says in a line where and what is wrong, and the cure.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = error.problem or str(error)
        cure = next((cure for start, cure in _CURES.items() if problem.startswith(start)), "")
        # A key without its colon is noticed one line late.
        late = problem.startswith("could not find expected ':'")
        mark = error.context_mark if late and error.context_mark else error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{problem}{cure and f'; {cure}'}") from None
    except yaml.YAMLError as error:
        cure = "; save it as UTF-8" if "#x0000" in str(error) else ""  # UTF-16 without its mark
        raise ValueError(f"{' '.join(str(error).split())}{cure}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        JobFileError: no such file, not UTF-8, not YAML, no mapping.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise JobFileError(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise JobFileError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise JobFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise JobFileError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise JobFileError(f"{path}: {what}; a job file is a mapping with the key kind")
    return raw
