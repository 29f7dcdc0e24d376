"""Steps by content: a step lies in `results/steps/<step>/<key>/`, and its key is made of all that decides its bytes.

That is: the parameters that its cells use and that can change them, the bytes of the files that parameters name, the
method cells of the notebook (not those tagged `figure`), the code of the package that these cells use, and the keys of
the steps before. Comments, docstrings and line breaks do not count. Another key is another folder, so nothing finished
is overwritten.
"""

import ast
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffseg
from diffseg.errors import DiffsegError
from diffseg.files import METADATA, sha256_file, sha256_text
from diffseg.lab.declarations import FILES, INERT
from diffseg.lab.manifests import fingerprint
from diffseg.lab.parameters import is_parameters, read_cells
from diffseg.paths import from_home, locate, project_root, sources

# step -> the steps whose artefacts it reads directly, in running order
STEPS = {
    "01_prompt_augmentation": [],
    "02_lora_tuning": [],
    "03_drawing": ["01_prompt_augmentation", "02_lora_tuning"],
    "03_synthesis": ["01_prompt_augmentation", "03_drawing"],
    "04_robust_training": ["03_synthesis"],
    "05_evaluation": ["04_robust_training"],
    "06_report": [
        "01_prompt_augmentation",
        "02_lora_tuning",
        "03_drawing",
        "03_synthesis",
        "04_robust_training",
        "05_evaluation",
    ],
}
# Notebook 03 makes two steps: its cells tagged `drawing` decide the images and their word maps, the others the masks
# made of these, so another beta or refiner draws nothing anew.
NOTEBOOKS = {"03_drawing": "03_synthesis"}
PACKAGE = Path(diffseg.__file__).parent
CARD = "README.md"  # describes a folder of weights and enters no computation
KEY_LENGTH = 20  # hex digits of the sha256: short paths, and no two steps of one name meet


def notebook_of(step: str) -> Path:
    return project_root() / "notebooks" / f"{NOTEBOOKS.get(step, step)}.ipynb"


def steps_of(notebook: Path) -> list[str]:
    """Return the steps that a notebook makes, in its own order."""
    return [step for step in STEPS if notebook_of(step) == notebook] or [notebook.stem]


def upstream(step: str) -> set[str]:
    """Return every step that `step` depends on, directly or not."""
    direct = STEPS.get(step, [])
    return set(direct).union(*(upstream(name) for name in direct))


def results_folder(out: str = "") -> Path:
    """Return the folder of all steps and runs, absolute: `out`, by default results.

    A relative one counts from the project's root, so that it means the same in the runner, papermill and JupyterLab.
    """
    return (project_root() / from_home(out or "results")).absolute()


def run_folder(run: str, out: str = "") -> Path:
    """Return a run's folder of links; a name may have one slash, as a study's runs have (STUDY/RUN)."""
    return results_folder(out) / "runs" / run


def step_folder(step: str, key: str, out: str = "") -> Path:
    return results_folder(out) / "steps" / step / key


def linked_keys(run: Path) -> dict[str, str]:
    """Return step -> key of the steps that a run's folder links to."""
    return {step: (run / step).readlink().name for step in STEPS if (run / step).is_symlink()}


# ------------------------------------------------------------------------------------------------------ the key


def step_key(step: str, parameters: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """Return the key of a step with all its notebook's parameters; `keys` are those of the steps before it."""
    return key_of(step_recipe(step, parameters, keys))


def key_of(recipe: Mapping[str, Any]) -> str:
    """Return the digest of a recipe, whatever the order of its entries."""
    return sha256_text(json.dumps(recipe, sort_keys=True))[:KEY_LENGTH]


def step_recipe(step: str, parameters: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return all that decides what a step makes; a step before it that has no key raises DiffsegError."""
    for name in STEPS.get(step, []):
        if name not in keys:
            raise DiffsegError(f"{step} needs {name}, which this run has not made; run that step first.")
    cells = method_cells(step)
    used = {name: parameters[name] for name in names_in(cells) & parameters.keys() - INERT}
    if not (used.get("train_real", True) or used.get("mix_real", True)):  # no labelled image is read
        used = {
            name: value for name, value in used.items() if name not in ("data_root", "data_names", "training_split")
        }
    if used.get("class_list") and "data_root" not in used:  # then a benchmark's name says where labelled images lie
        del used["benchmark"]
    files = {name: fingerprint(found.items()) for name, found in named_files(used).items()}
    return {
        "parameters": {n: v for n, v in used.items() if not (n in files and n in FILES)},  # bytes count, not the place
        "files": files,
        "cells": sha256_text("\n".join(map(without_comments, cells))),
        "code": code_of(cells),
        "upstream": {name: keys[name] for name in STEPS.get(step, [])},
    }


def method_cells(step: str) -> list[str]:
    """Return the code cells that decide what a step makes; one that is no Python raises DiffsegError."""
    cells = [cell for cell in read_cells(notebook_of(step)) if cell["cell_type"] == "code" and not is_parameters(cell)]
    tagged = [(set(cell["metadata"].get("tags", [])), cell["source"]) for cell in cells]
    is_part = step in NOTEBOOKS
    sources = [source for tags, source in tagged if "figure" not in tags and ("drawing" in tags) == is_part]
    for source in sources:
        try:
            ast.parse(source)
        except SyntaxError as error:
            name = notebook_of(step).name
            raise DiffsegError(f"a cell of {name} is no Python ({error.msg}: {error.text!r}); correct it.") from None
    return sources


def names_in(cells: Iterable[str]) -> set[str]:
    """Return the names that occur in cells."""
    return {node.id for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)}


@functools.cache
def without_comments(source: str) -> str:
    """Return Python code in one normal form, whatever Python's version: no comments, docstrings or line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
                node.body = body[1:] or [ast.Pass()]

    def form(node: Any) -> Any:  # fields that a newer Python has are empty in older code
        if isinstance(node, ast.AST):
            fields = [[name, form(value)] for name, value in ast.iter_fields(node) if value not in (None, [])]
            return [type(node).__name__, *fields]
        return [form(each) for each in node] if isinstance(node, list) else repr(node)

    return json.dumps(form(tree))


def code_of(cells: Iterable[str]) -> dict[str, str]:
    """Return module -> sha256 of the code of the package's modules that cells use (`imported`)."""
    return {module: file_digest(module_path(module)) for module in sorted(imported(cells))}


def imported(cells: Iterable[str]) -> set[str]:
    """Return the package's modules that cells use: those that they import, and what these import in turn.

    Not followed are figures, where processes come from, and the lab, which decide nothing of an artefact, but for a
    module of the lab that a cell imports itself, as the report does.
    """
    found: set[str] = set()
    queue = [module for cell in cells for module in imports_of(cell) if module != "diffseg.lab.runs"]
    while queue:
        module = queue.pop()
        if module not in found and module not in ("diffseg.figures", "diffseg.charts", "diffseg.forking"):
            found.add(module)
            if not module.startswith("diffseg.lab"):
                inner = imports_of(module_path(module).read_text(encoding="utf-8"))
                queue += [name for name in inner if not name.startswith("diffseg.lab")]
    return found


@functools.cache
def imports_of(source: str) -> tuple[str, ...]:
    """Return the package's modules that a source imports, also inside functions."""
    nodes = [*ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(n for n in dict.fromkeys(names) if n.startswith("diffseg.") and module_path(n).suffix == ".py")


def module_path(module: str) -> Path:
    """Return a module's file; what is none, such as a function's name, gives a path without a suffix."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), place)


def named_files(parameters: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return parameter -> (file -> sha256) of the files that parameters name, but hidden ones and cards of a folder.

    A short name such as "mini" stands for what it is made of (`diffseg.paths.sources`), a benchmark for its word table
    and class list; a data set of one's own counts whole. What is no file or folder, as a hub's id, adds nothing.
    """
    named = {}
    named_here = FILES | ({"data_root"} if parameters.get("benchmark") == "folder" else set())
    for parameter, value in parameters.items():
        if parameter == "benchmark":
            tables = PACKAGE / "data"
            stem = value.removesuffix("-things")
            listed = [tables / f"words_{re.sub(r'^imagenet-s-.*', 'imagenet_s', stem)}.csv"]
            places = [*listed, tables / f"{stem.replace('mini-imagenet-s', 'imagenet-s-mini').replace('-', '_')}.txt"]
        elif (parameter, value) == ("encoder_weights", "imagenet"):  # no folder of that name (`encoder_folder`)
            continue
        elif not (isinstance(value, str) and value and (parameter in named_here or sources(parameter, value))):
            continue
        else:
            places = sources(parameter, value) or [locate(parameter, value)]
        found = {}
        for place in places:
            for path in [place] if place.is_file() else files_below(place):
                inside = path.relative_to(place) if place.is_dir() else Path(path.name)
                if path.name != CARD and not any(part.startswith(".") for part in inside.parts):
                    found[inside.as_posix()] = file_digest(path)
        if parameter == "target_images":  # captions may stand in the folders above (`diffseg.target_domain`)
            for number, above in enumerate(places[0].absolute().parents, start=1):
                if (captions := above / METADATA).is_file():
                    found["../" * number + captions.name] = file_digest(captions)
        if found:
            named[parameter] = found
    return named


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; linked folders are walked, each once."""
    found, walked = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in walked:
            folders.clear()
            continue
        walked.add(real)
        folders.sort()
        found += [path for name in names if (path := Path(place, name)).is_file()]
    return sorted(found)


def file_digest(path: Path) -> str:
    """Return a file's sha256 (of a module of diffseg its code's); gigabytes of weights are read once, not for every
    step."""
    if path.suffix == ".py" and path.is_relative_to(PACKAGE):
        return sha256_text(without_comments(path.read_text(encoding="utf-8")))
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    return sha256_file(path)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in a few words in what two recipes of a step differ."""
    names = []
    for part, words in (("parameters", "{}"), ("files", "the files of {}"), ("code", "{}")):
        before, after = old.get(part, {}), new.get(part, {})
        names += [words.format(n) for n in {**before, **after} if before.get(n) != after.get(n)]
    names += ["its notebook's cells"] if old.get("cells") != new.get("cells") else []
    names += [n for n, key in new["upstream"].items() if old.get("upstream", {}).get(n) != key]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") + " changed"
