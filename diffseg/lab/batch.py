"""The batch runner: the notebooks of a parameter file in order over papermill; what is finished is found, not made."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError, Incomplete
from diffseg.files import write_text
from diffseg.lab import processes
from diffseg.lab.combinations import check_together
from diffseg.lab.declarations import check, hint
from diffseg.lab.forked import warm
from diffseg.lab.locks import acquire, run_lock, step_lock
from diffseg.lab.manifests import read_manifest
from diffseg.lab.parameters import declared, read_yaml
from diffseg.lab.runs import link, trouble, writing
from diffseg.lab.steps import (
    STEPS,
    difference,
    key_of,
    notebook_of,
    run_folder,
    step_folder,
    step_recipe,
    steps_of,
    upstream,
)
from diffseg.paths import from_home, project_root

MINIMUM_FREE = 1e9  # bytes; our choice: the largest step of a mini run writes half of it


def run(
    name: str,
    only: str | None = None,
    changes: Mapping[str, Any] | None = None,
    out: str = "",
    force: bool = False,
    shard: str = "",
    verify: bool = False,
) -> Path:
    """Run the notebooks of a parameter file in order, link what is finished, return the run's folder.

    `name` is a file of notebooks/params (without suffix) or a path to a YAML file; `only` are notebooks such as "3-5"
    or "1,3"; `changes` override parameters; `out` is the folder of steps and runs, relative to the working directory
    (default: results); `force` executes the notebooks of finished steps again, for the run's own figures and executed
    notebooks: they find their results; `shard` "3/16" does the third of sixteen parts of notebook 3; `verify` hashes
    every file of finished steps. All values are checked before anything runs. A wrong value and a step that fails
    raise DiffsegError. Of several processes this is the main one; the others call `diffseg.lab.processes.assist`.
    """
    warm()
    notebooks = step_notebooks()
    values, folder = resolve(name, changes or {}, out)
    selected = select(only, list(notebooks))
    if shard:
        processes.parse_shard(shard)
        if selected != ["03_synthesis"]:
            raise DiffsegError("--shard divides notebook 3 only; give --only 3, after --only 1-2 has been run.")
    needed = {step for name in selected for made in steps_of(notebooks[name]) for step in (made, *upstream(made))}
    check_selected(selected, values, f"run {name}")
    from diffseg.lab.kernel import execute  # here: notebooks and `diffseg list` need not wait for papermill

    with working_in(folder, bool(shard)), processes.Group() as group:
        recipes: dict[str, dict] = {}
        keys: dict[str, str] = {}
        for number, (name, notebook) in enumerate(notebooks.items(), start=1):
            steps = [step for step in steps_of(notebook) if step in needed]
            if not steps:
                continue
            parameters = step_parameters(notebook, values)
            for step in steps:
                recipes[step] = step_recipe(step, parameters, keys)
                keys[step] = key_of(recipes[step])
            folders = {step: step_folder(step, keys[step], values.get("out", "")) for step in steps}
            title = f"{name}: {number} of {len(notebooks)}"
            waiting = f"{title}, waits for another run that makes the same"
            with contextlib.ExitStack() as claims:
                for step in steps:  # two runs at the same time do not make a step twice
                    claims.enter_context(acquire(*step_lock(folders[step]), bool(shard), waiting))
                problem = next(filter(None, (trouble(path, verify) for path in folders.values())), "")
                executed = folder / "notebooks" / f"{name}{processes.suffix(shard)}.ipynb"
                was = [(folder / step).resolve() == path.resolve() for step, path in folders.items()]
                made = {step: keys[step] for step in steps}
                # the run's figures are of other parameters or code, or of a notebook that was killed, or of a share
                is_old = (
                    not shard
                    and any(executed.parent.glob(f"{name}*.ipynb"))
                    and not (all(was) and noted(executed) == made)
                )
                if not problem and not ((force or is_old) and name in selected):
                    maker = read_manifest(folders[steps[-1]])["run"]
                    print(f"{title}, " + ("up to date" if all(was) else f"shared with {maker}"), flush=True)
                    for step, path in folders.items():
                        link(folder / step, path)
                    continue
                if name not in selected:
                    raise DiffsegError(f"run {name} first, with --only {int(name[:2])}: {problem}.")
                print(title + why(folder, recipes, steps, problem), flush=True)
                start = time.monotonic()
                os.environ[processes.SHARD] = shard  # for the kernel
                try:
                    with writing(folder), group.together(notebook, parameters, folder):
                        execute(notebook, executed, parameters, folder)
                except Incomplete as rest:
                    if not shard:
                        raise
                    print(f"{title}, share {shard} is done; {rest}", flush=True)
                    return folder
                for path in folders.values():
                    if problem := trouble(path):
                        raise DiffsegError(f"{name} ended but {problem} in {path}; it must end with step.finish.")
                note(executed, made)
                print(f"{title}, done in {time.monotonic() - start:.0f} s", flush=True)
    if "06_report" in selected:
        print_results(folder)
    return folder


def why(folder: Path, recipes: Mapping[str, dict], steps: list[str], problem: str) -> str:
    """Say what makes a run's step run again: files that are missing, or what changed since the step it links to."""
    for step in steps:
        old = read_manifest(folder / step) if (folder / step).exists() else None
        if old and old["key"] != key_of(recipes[step]):
            return f", anew because {difference(old['recipe'], recipes[step])}"
    return f", again because {problem}" if "missing" in problem else ""


def note(executed: Path, keys: Mapping[str, str]) -> None:
    """Write the keys of its steps into a notebook that was executed to the end."""
    content = json.loads(executed.read_text(encoding="utf-8"))
    content["metadata"]["diffseg"] = dict(keys)
    write_text(executed, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def noted(executed: Path) -> dict[str, str]:
    """Return what `note` wrote; nothing of a notebook that is not there or was not executed to the end."""
    try:
        return json.loads(executed.read_text(encoding="utf-8"))["metadata"]["diffseg"]
    except (OSError, ValueError, LookupError):
        return {}


def step_notebooks() -> dict[str, Path]:
    """Return the notebooks that are there, by name, in running order."""
    paths = dict.fromkeys(notebook_of(step) for step in STEPS)
    return {path.stem: path for path in paths if path.is_file()}


def step_parameters(notebook: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a notebook, checked: those of `values` that it declares, defaults for the rest."""
    defaults = declared(notebook)
    return check({name: values.get(name, default) for name, default in defaults.items()}, defaults, notebook.name)


def check_selected(selected: Iterable[str], values: Mapping[str, Any], source: str) -> None:
    """Compare the parameters of the selected notebooks with one another, as `check_together` does."""
    there = step_notebooks()
    notebooks = [there[name] for name in selected]
    chosen = {k: v for notebook in notebooks for k, v in step_parameters(notebook, values).items()}
    if "05_evaluation" in selected and "04_robust_training" in there:
        # what the networks have seen counts, though they may be there already
        trained = step_parameters(there["04_robust_training"], values)
        chosen |= {name: trained[name] for name in {"train_real", "mix_real", "training_split"} & trained.keys()}
    check_together(chosen, source, {k: v for notebook in notebooks for k, v in declared(notebook).items()})


def resolve(name: str, changes: Mapping[str, Any], out: str = "", source: str = "--set") -> tuple[dict[str, Any], Path]:
    """Return the checked values of a parameter file under `changes`, and the run's folder (see `run`).

    `source` says in an error where the changes come from.
    """
    defaults = {name: default for path in step_notebooks().values() for name, default in declared(path).items()}
    path = parameter_file(name)
    values = check(read_yaml(path), defaults, path.name) | check(dict(changes), defaults, source)
    if out:
        values["out"] = str(from_home(out).absolute())
    if "run" not in values:
        raise DiffsegError(f"{path} does not name its run; add a line `run: {path.stem}`.")
    return values, run_folder(values["run"], values.get("out", ""))


def parameter_file(name: str) -> Path:
    """Return the YAML file of a name in notebooks/params, or the path itself when it is one."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return named_file("params", name, "parameter file")


def named_file(room: str, name: str, what: str) -> Path:
    """Return notebooks/<room>/<name>.yaml; raise DiffsegError, with the nearest name, when there is none."""
    folder = project_root() / "notebooks" / room
    names = [path.stem for path in folder.glob("*.yaml")]
    if name not in names:
        raise DiffsegError(f"there is no {what} in {folder} named {name}; {hint(name, names)}")
    return folder / f"{name}.yaml"


def select(only: str | None, names: list[str]) -> list[str]:
    """Return the notebooks of a text such as "3", "3-5" or "1,3", numbered as they are; None is all."""
    if only is None:
        return names
    numbered = {int(name[:2]): name for name in names}
    chosen: set[int] = set()
    for part in only.split(","):
        first, _, last = (text.strip() for text in part.partition("-"))
        last = last or first
        if not (first.isdecimal() and last.isdecimal()):
            raise DiffsegError(f"--only takes numbers of notebooks such as 3, 3-5 or 1,3, not {only[:40]!r}.")
        if max(len(first), len(last)) > 3 or not {int(first), int(last)} <= numbered.keys() or int(first) > int(last):
            raise DiffsegError(f"--only {only[:40]} asks for what is not there; there are {', '.join(names)}.")
        chosen |= set(range(int(first), int(last) + 1))
    return [name for number, name in numbered.items() if number in chosen]


@contextlib.contextmanager
def working_in(folder: Path, shared: bool = False) -> Iterator[None]:
    """Make the run's folder, check that it can be written, and hold it, as two would undo each other."""
    with writing(folder):
        lock = acquire(*run_lock(folder), shared)
        free = shutil.disk_usage(folder).free
    with lock:
        if free < MINIMUM_FREE:
            raise DiffsegError(
                f"only {free / 1e6:.0f} MB are free in {folder}, less than {MINIMUM_FREE / 1e6:.0f} MB; "
                "free some space or set another out."
            )
        yield


def print_results(folder: Path) -> None:
    """Write the run's summary.json, and print its table, whether it reproduces the published run, and its figures."""
    from diffseg.lab.report import reproduction, reproduction_text  # here: pandas takes a second to load

    summary = json.loads((folder / "06_report" / "summary.json").read_text(encoding="utf-8"))
    compared = reproduction(folder, summary)
    write_text(folder / "summary.json", json.dumps(summary | {"reproduction": compared}, indent=1) + "\n")
    print("\n" + (folder / "06_report" / "table.txt").read_text(encoding="utf-8").rstrip() + "\n")
    if compared:
        print(reproduction_text(compared) + "\n")
    for path in [*sorted((folder / "figures").glob("06_*.png")), folder / "summary.json"]:
        print(path)
