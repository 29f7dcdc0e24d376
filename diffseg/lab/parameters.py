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
from diffseg.lab.declarations import FILES, INERT, assign, check_together, refusal, shown, violations

__all__ = [
    "FILES",
    "INERT",
    "Parameter",
    "check",
    "check_together",
    "declared",
    "is_parameters",
    "merge",
    "parse_assignments",
    "read_cells",
    "read_yaml",
]

TYPES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list"}


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


def coerce(name: str, value: Any, default: Any, source: str) -> Any:
    """Return `value` in the type of `default` when nothing is lost, else raise DiffsegError.

    YAML 1.1 reads 1e-4 as a text and papermill's `-p` hands over 'true': both are understood. A number is
    never taken for a truth value nor a truth value for a number; 3.0 is a whole number, 3.5 is not; only
    finite numbers are taken. The elements of a list follow its default's elements when these are all of one
    type. `source` says in an error where the value comes from.
    """
    kind = type(default)
    if kind is list and isinstance(value, list | tuple):
        kinds = {type(element) for element in default}
        if len(kinds) == 1:
            return [coerce(f"{name}[{i}]", element, default[0], source) for i, element in enumerate(value)]
        if all(type(element) in (bool, int, float, str) for element in value):
            return [coerce(name, element, element, source) for element in value]
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
    is_unquoted = kind is str and value is not None
    remedy = "Put it in quotes." if is_unquoted else assign(name.partition("[")[0], default)
    raise refusal(name, value, source, f"be {TYPES[kind]}", remedy)


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
    """Return `values`, some or all of the `parameters`, in the declared types and ranges; raise DiffsegError for the
    first that is not.

    `source` says in an error where the values come from. A name that `declarations` does not know is checked by the
    type of its default alone. What depends on other parameters, and on names that the method lists, is
    `check_together`'s.
    """
    for name in values:
        if name not in parameters:
            close = difflib.get_close_matches(str(name)[:80], parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(parameters))}."
            raise DiffsegError(f"{source} gives the parameter {str(name)[:80]}, which no notebook declares; {hint}")
    checked = {name: coerce(name, value, parameters[name].default, source) for name, value in values.items()}
    for where, value, rule, nearest in violations(checked):
        name = where.partition("[")[0]
        default = parameters[name].default
        is_edited = checked[name] == default  # somebody works in the parameters cell itself
        remedy = "Correct the parameters cell." if is_edited else assign(name, default if nearest is None else nearest)
        raise refusal(where, value, source, rule, remedy)
    return checked


class Loader(yaml.SafeLoader):
    """YAML in which each name stands once and nothing stands for something written elsewhere.

    PyYAML lets the last of two equal names win. An alias may contain itself, or unfold to gigabytes.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(
                None, None, "an alias (*) is not allowed; write the value out, a text in quotes", mark
            )
        return super().compose_node(parent, index)

    def flatten_mapping(self, node):
        seen = set()
        for key, _ in node.value:
            problem = "a merge key (<<) is not allowed; write it out" if key.tag == "tag:yaml.org,2002:merge" else ""
            if isinstance(key.value, str) and key.value in seen:
                problem = f"{key.value[:80]} is given twice; keep one"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else None)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text; raise DiffsegError, which begins with `source`, when it is not one."""
    try:
        return yaml.load(text, Loader)
    except yaml.constructor.ConstructorError as error:
        problem, mark = error.problem, error.problem_mark
    except RecursionError:
        problem, mark = "it is nested too deeply; a parameter is a value or a list of values", None
    except ValueError:  # of Python's types
        problem, mark = "it holds an impossible date or a number of thousands of digits; correct it", None
    except Exception as error:  # PyYAML's own, and what a broken tag makes of Python's types
        problem, mark = "a text with : # [ { or a date goes in quotes", getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    raise DiffsegError(f"{source} is not valid YAML{where}: {problem}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the flat mapping of a parameter file; raise DiffsegError when it is not one."""
    try:
        if path.exists() and not path.is_file():
            raise DiffsegError(f"{path} is not a file; give a parameter file, with lines `name: value`.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DiffsegError(f"{path} is not a text in UTF-8; give a parameter file, with lines `name: value`.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiffsegError(f"cannot read the parameter file {shown(str(path))} ({reason}); check its name.") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DiffsegError(f"{path} must hold lines `name: value`.")
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return {name: value} of texts `name=value`, each value read as YAML; raise DiffsegError for one that is not,
    and for a name given twice."""
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise DiffsegError(f"--set takes name=value, not {shown(assignment)}; write it as in --set seed=1.")
        if name in values:
            raise DiffsegError(f"--set gives {name[:80]} twice; keep one.")
        values[name] = parse_yaml(text, f"--set {name[:80]}") if text.strip() else ""
    return values
