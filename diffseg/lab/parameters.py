"""Parameters of a notebook: what its cell tagged `parameters` declares, and how parameter files are read."""

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from diffseg.errors import DiffsegError
from diffseg.lab.declarations import TYPES, shown


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


def declared(notebook: Path) -> dict[str, Any]:
    """Return name -> default of the parameters that a notebook declares, in the order of its cell.

    Only lines `name = literal  # help` are allowed, so that papermill's own reading finds the same names (an
    annotation or a second `=` would hide one from it). Anything else in the cell raises DiffsegError.
    """
    cells = [cell for cell in read_cells(notebook) if is_parameters(cell)]
    if len(cells) != 1:
        raise DiffsegError(f"{notebook.name} has {len(cells)} cells tagged `parameters`; it must have exactly one.")
    defaults = {}
    try:
        for node in ast.parse(cells[0]["source"]).body:
            [target] = node.targets
            defaults[target.id] = ast.literal_eval(node.value)
            if type(defaults[target.id]) not in TYPES:
                raise ValueError
    except (SyntaxError, ValueError, AttributeError):
        raise DiffsegError(
            f"the parameters cell of {notebook.name} may only hold lines `name = value  # help`, one a line, "
            "with a bool, number, text, list or dictionary as value."
        ) from None
    return defaults


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
