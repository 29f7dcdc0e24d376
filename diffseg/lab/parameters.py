"""Parameters of a notebook: what its cell tagged `parameters` declares, and how values are read."""

import ast
import difflib
import io
import json
import math
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffseg.errors import DiffsegError

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


@dataclass(frozen=True)
class Parameter:
    """One line `name = default  # help` of a parameters cell; the default's type is the parameter's type."""

    name: str
    default: bool | int | float | str | list
    help: str


def read_cells(notebook: Path) -> list[dict]:
    """Return the notebook's cells, each "source" one string; an unreadable notebook raises DiffsegError."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except FileNotFoundError:
        raise DiffsegError(f"there is no notebook {notebook}; check the step's name.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DiffsegError(f"{notebook} is not a readable notebook; restore it with git.") from None


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell.get("metadata", {}).get("tags", [])


def declared(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares, by name, in the order of its cell.

    Only lines `name = literal  # help` are allowed, so that papermill's own reading finds the same names (an
    annotation or a second `=` would hide one from it). Anything else in the cell raises DiffsegError.
    """
    cells = [cell for cell in read_cells(notebook) if is_parameters(cell)]
    if len(cells) != 1:
        raise DiffsegError(f"{notebook.name} has {len(cells)} cells tagged `parameters`; it must have exactly one.")
    source = cells[0]["source"]
    parameters = {}
    try:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body:
            [target] = node.targets
            default = ast.literal_eval(node.value)
            if type(default) not in TYPES:
                raise ValueError
            parameters[target.id] = Parameter(target.id, default, comments.get(node.end_lineno, ""))
    except (SyntaxError, ValueError, AttributeError, tokenize.TokenError):
        raise DiffsegError(
            f"the parameters cell of {notebook.name} may only hold lines `name = value  # help`, one a line, "
            "with a bool, number, text or list as value."
        ) from None
    return parameters


def coerce(name: str, value: Any, default: Any) -> Any:
    """Return `value` in the type of `default` when nothing is lost, else raise DiffsegError.

    YAML 1.1 reads 1e-4 as a text and papermill's `-p` hands over 'true': both are understood. A number is
    never taken for a truth value nor a truth value for a number; 3.0 is a whole number, 3.5 is not; only
    finite numbers are taken. The elements of a list follow its default's elements when these are all of one
    type.
    """
    kind = type(default)
    if kind is list and isinstance(value, list | tuple):
        kinds = {type(element) for element in default}
        if len(kinds) == 1:
            return [coerce(f"{name}[{i}]", element, default[0]) for i, element in enumerate(value)]
        if all(type(element) in (bool, int, float, str) for element in value):
            return [coerce(name, element, element) for element in value]
    elif kind is str and isinstance(value, str):
        return str(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            # int() first: a large whole number must not lose digits on its way through a float
            number = (
                int(value) if isinstance(value, int) or re.fullmatch(r"\s*[+-]?\d+\s*", str(value)) else float(value)
            )
            if math.isfinite(number) and kind(number) == number:
                return kind(number)
        except (ValueError, OverflowError):
            pass
    hint = "; put it in quotes" if kind is str and value is not None else ""
    raise DiffsegError(f"parameter {name} must be {TYPES[kind]} such as {default!r}, not {value!r}{hint}.")


def merge(notebooks: Iterable[Path]) -> dict[str, Parameter]:
    """Return one flat name space over several notebooks; a name with two types raises DiffsegError."""
    owner: dict[str, tuple[Parameter, str]] = {}
    for notebook in notebooks:
        for parameter in declared(notebook).values():
            first, other = owner.setdefault(parameter.name, (parameter, notebook.name))
            if type(first.default) is not type(parameter.default):
                raise DiffsegError(
                    f"{other} and {notebook.name} declare the parameter {parameter.name} with two types "
                    f"({type(first.default).__name__} and {type(parameter.default).__name__}); rename one."
                )
    return {name: parameter for name, (parameter, _) in owner.items()}


def check(values: dict[str, Any], parameters: dict[str, Parameter], source: str) -> dict[str, Any]:
    """Return `values` coerced to the declared types; `source` says in an error where the values come from."""
    for name in values:
        if name not in parameters:
            close = difflib.get_close_matches(str(name), parameters, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(parameters))}."
            raise DiffsegError(f"{source} gives the parameter {name}, which no notebook declares{hint}")
    return {name: coerce(name, value, parameters[name].default) for name, value in values.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the flat mapping of a parameter file; raise DiffsegError when it is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DiffsegError(f"cannot read the parameter file {path}: {error}.") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise DiffsegError(f"{path} is not valid YAML near line {line}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DiffsegError(f"{path} must hold lines `name: value`.")
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return {name: value} of texts `name=value`, each value read as YAML."""
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise DiffsegError(f"--set takes name=value, not {assignment!r}.")
        try:
            values[name.strip()] = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError:
            raise DiffsegError(f"--set {assignment!r}: the value is not valid YAML; put it in quotes.") from None
    return values
