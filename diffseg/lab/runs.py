"""Runs: a step from inside its notebook (`begin`), and all steps in order over papermill (`run`).

A step's folder holds `in-progress.json` while the step works and `manifest.json` once it is finished, both
with the step's key. Killed at any moment, a step leaves whole files only and continues with them if its key
is the same. Runs that share (`run(share=True)`) hold a link in place of a step that another run has made.
"""

import contextlib
import datetime
import difflib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, sha256_file
from diffseg.lab import processes
from diffseg.lab.manifests import (
    MANIFEST,
    STEPS,
    UNFINISHED,
    WHERE,
    altered,
    named_files,
    notebook_path,
    plain,
    provenance,
    read_json,
    read_manifest,
    run_folder,
    step_key,
    trouble,
    upstream,
)
from diffseg.lab.parameters import check, declared, merge, read_yaml
from diffseg.lab.sharing import claimed, confirm, link, remove
from diffseg.paths import project_root

__all__ = ["Step", "begin", "read_manifest", "run", "run_folder"]

IN_PROGRESS = "in-progress.json"
EXECUTED = "notebook.ipynb"
MINIMUM_FREE = 200e6  # bytes; our choice: a mini run writes about half of it


@dataclass
class Step:
    """A step at work, as `begin` returns it to the notebook."""

    name: str
    folder: Path  # absolute; artefacts go here
    parameters: dict[str, Any]  # resolved and checked
    key: str
    resumed: bool  # earlier artefacts of the same key are kept
    run: Path  # the run's folder
    inputs: dict[str, str] = field(default_factory=dict)  # "NN_step/file", or the path of a named file -> sha256
    started: float = field(default_factory=time.time)

    def input(self, step: str, name: str = ".") -> Path:
        """Return the path of an upstream step's output file, or of a folder of outputs ("." for all of them).

        The files are recorded with their sha256. A step that is not upstream or not finished, a name that is
        none of its outputs and a file altered since raise DiffsegError.
        """
        if step not in upstream(self.name):
            raise DiffsegError(f"{self.name} does not stand on {step}; add it to STEPS in diffseg/manifest.py.")
        folder = self.run / step
        manifest = read_manifest(folder)
        if manifest is None:
            raise DiffsegError(f"{self.name} needs {step}, which is not finished in {folder}; run that step first.")
        outputs = {
            output: sha
            for output, sha in manifest["outputs"].items()
            if name in (".", output) or output.startswith(f"{name}/")
        }
        if not outputs:
            raise DiffsegError(f"{step} has no output {name}; it has {', '.join(sorted(manifest['outputs'])[:8])}.")
        if bad := altered(folder, {"outputs": outputs}):
            raise DiffsegError(f"{folder / bad[0]} is missing or altered since {step} finished; run {step} again.")
        self.inputs |= {f"{step}/{output}": sha for output, sha in outputs.items()}
        return folder / name

    def finish(self, outputs: Iterable[str | os.PathLike], metrics: dict[str, Any] | None = None) -> dict:
        """Check the declared outputs, write `manifest.json` as the last file of the step and return it.

        `outputs` are paths or globs relative to the folder. One that is absent, matches nothing or is an
        empty file raises DiffsegError. `metrics` may hold numbers, texts, lists, arrays, dictionaries; NaN
        becomes null.
        """
        names = sorted({name for output in outputs for name in self._match(output)})
        with writing(self.folder):
            manifest = {
                "step": self.name,
                "run": self.run.name,
                "key": self.key,
                "parameters": {name: value for name, value in self.parameters.items() if name not in WHERE},
                **provenance(),
                "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat(),
                "seconds": round(time.time() - self.started, 2),  # of this attempt, when the step was resumed
                "resumed": self.resumed,
                "inputs": self.inputs,
                "outputs": {name: sha256_file(self.folder / name) for name in names},
                "metrics": plain(metrics or {}),
            }
            write_json(self.folder / MANIFEST, manifest)
            (self.folder / IN_PROGRESS).unlink(missing_ok=True)
        return manifest

    def _match(self, output: str | os.PathLike) -> list[str]:
        pattern = os.path.relpath(self.folder / output, self.folder)
        if pattern.startswith(".."):
            raise DiffsegError(f"{self.name} declares the output {output}, which lies outside {self.folder}.")
        paths = [self.folder / pattern] if (self.folder / pattern).is_file() else self.folder.glob(pattern)
        files = [
            p for p in paths if p.is_file() and p.name not in (IN_PROGRESS, MANIFEST, EXECUTED) and p.name[0] != "."
        ]
        if not files:
            raise DiffsegError(f"{self.name} declares the output {output} but has not written it in {self.folder}.")
        for path in files:
            if path.stat().st_size == 0:
                raise DiffsegError(f"{self.name} has written an empty file {path}; delete it and run the step again.")
        return [path.relative_to(self.folder).as_posix() for path in files]


def begin(step_name: str, namespace: dict[str, Any]) -> Step:
    """Open a step from its notebook: `step = runs.begin("03_synthesis", globals())`.

    Takes the values of the declared parameters from `namespace`, converts them and puts them back. The folder
    keeps what an attempt with the same key made, finished or not (but for altered files), else it is emptied.
    Raises DiffsegError on a wrong value, an unfinished upstream step or an unwritable folder. A process that helps
    the main one gets a scratch folder (`diffseg.lab.processes`).
    """
    notebook = notebook_path(step_name)
    names = declared(notebook)
    missing = [name for name in (*names, *WHERE) if name not in namespace]
    if missing:
        raise DiffsegError(f"{step_name} misses the parameter {missing[0]}; run its parameters cell first.")
    parameters = check({name: namespace[name] for name in names}, names, notebook.name)
    namespace.update(parameters)
    folder = run_folder(namespace["run"], namespace["out"]) / step_name
    key = step_key(step_name, parameters, folder.parent)
    if processes.rank():
        processes.meet()  # the main process sorts out what is there
        return Step(step_name, processes.own_folder(folder), parameters, key, False, folder.parent)
    if folder.is_symlink():
        folder.unlink()  # another run's step: it is not ours to alter
    manifest, progress = read_manifest(folder), read_json(folder / IN_PROGRESS)
    resumed = key in ((manifest or {}).get("key"), (progress or {}).get("key"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if resumed:
            write_json(folder / IN_PROGRESS, {"key": key})
            damaged = altered(folder, manifest) if manifest and manifest["key"] == key else []
            # a killed attempt leaves the temporary files of atomic_path behind
            for path in [folder / MANIFEST, *(folder / name for name in damaged), *folder.rglob(".*.tmp*")]:
                path.unlink(missing_ok=True)
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            empty(folder)
            write_json(folder / IN_PROGRESS, {"key": key})
    processes.meet()
    return Step(step_name, folder, parameters, key, resumed, folder.parent, named_files(parameters))


def empty(folder: Path) -> None:
    """Remove everything in a step's folder but the executed notebook, which papermill is writing."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != EXECUTED:
            path.unlink()


def write_json(path: Path, value: dict) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in a folder's place into one sentence."""
    try:
        yield
    except OSError as error:
        raise DiffsegError(
            f"cannot write to {folder} ({error.strerror or error}); free some space or set another out."
        ) from None


def run(
    name: str,
    only: str | None = None,
    set: dict[str, Any] | None = None,
    out: str = "",
    force: bool = False,
    share: bool = False,
) -> Path:
    """Run the steps of a parameter file in order, skip those that are up to date, return the run's folder.

    `name` is a file of notebooks/params (without suffix) or a path to a YAML file; `only` are steps such as
    "3-5" or "1,3"; `set` overrides parameters; `out` is where the run's folder goes, relative to the working
    directory; `force` makes the steps anew; `share` links finished steps of the same key from any run in
    results/runs instead. All values are checked before anything runs. A wrong value and a step that fails raise
    DiffsegError. Of several processes this is the main one; the others call `diffseg.lab.processes.assist`.
    """
    notebooks = step_notebooks()
    values, folder = resolve(name, set or {}, out)
    selected = select(only, list(notebooks))
    wanted = {*selected, *(before for step in selected for before in upstream(step))}
    from diffseg.lab.kernel import execute  # here: notebooks and `diffseg list` need not wait for papermill

    with locked(folder), processes.Group() as group:
        for number, (step, notebook) in enumerate(notebooks.items(), start=1):
            if step not in wanted:
                continue
            parameters = step_parameters(notebook, values)
            key = step_key(step, parameters, folder)
            title = f"{step}: {number} of {len(notebooks)}"
            with claimed(key, title) if share else contextlib.nullcontext():
                problem = trouble(folder / step, key, parameters)
                if problem and share and not force and (maker := link(folder / step, key)):
                    print(f"{title}, shared with {maker}", flush=True)
                    continue
                if step not in selected:
                    if problem:
                        raise DiffsegError(f"run {step} first, with --only {int(step[:2])}: {problem}.")
                    continue
                if not problem and not force:
                    print(f"{title}, up to date", flush=True)
                    continue
                # what is half done, altered or of another key is sorted out by `begin`, in the notebook
                print(f"{title}, again because {problem}" if problem not in ("", UNFINISHED) else title, flush=True)
                start = time.monotonic()
                with writing(folder / step):
                    if force or (folder / step).is_symlink():
                        remove(folder / step)
                    with group.together(notebook, parameters, folder):
                        execute(notebook, folder / step / EXECUTED, parameters, folder)
                if problem := trouble(folder / step, key, parameters):
                    raise DiffsegError(f"{step} ended but {problem}; its notebook must end with step.finish.")
                confirm(folder / step, key, parameters)
                print(f"{title}, done in {time.monotonic() - start:.0f} s", flush=True)
    if "06_report" in selected:
        print_results(folder)
    return folder


def step_notebooks() -> dict[str, Path]:
    """Return the notebooks that are there, by step, in running order."""
    return {step: notebook_path(step) for step in STEPS if notebook_path(step).is_file()}


def step_parameters(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return all parameters of a notebook: those of `values` that it declares, defaults for the rest."""
    return {name: values.get(name, parameter.default) for name, parameter in declared(notebook).items()}


def resolve(name: str, changes: dict[str, Any], out: str = "", source: str = "--set") -> tuple[dict[str, Any], Path]:
    """Return the checked values of a parameter file under `changes`, and the run's folder (see `run`).

    `source` says in an error where the changes come from.
    """
    known = merge(step_notebooks().values())
    path = parameter_file(name)
    values = check(read_yaml(path), known, path.name) | check(changes, known, source)
    if out:
        values["out"] = os.path.abspath(os.path.expanduser(out))
    if "run" not in values:
        raise DiffsegError(f"{path} does not name its run; add a line `run: {path.stem}`.")
    return values, run_folder(values["run"], values.get("out", ""))


def parameter_file(name: str) -> Path:
    """Return the YAML file of a name in notebooks/params, or the path itself when it is one."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folder = project_root() / "notebooks" / "params"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}."
        raise DiffsegError(f"there are no parameters named {name} in {folder}; {hint}")
    return path


def select(only: str | None, steps: list[str]) -> list[str]:
    """Return the steps of a text such as "3", "3-5" or "1,3", numbered as the notebooks are; None is all."""
    if only is None:
        return steps
    numbers: list[int] = []
    for part in only.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdecimal() and (last or first).strip().isdecimal()):
            raise DiffsegError(f"--only takes step numbers such as 3, 3-5 or 1,3, not {only!r}.")
        numbers += range(int(first), int(last or first) + 1)
    by_number = {int(step[:2]): step for step in steps}
    for number in numbers or [-1]:
        if number not in by_number:
            raise DiffsegError(f"--only {only} asks for a step that is not there; the steps are {', '.join(steps)}.")
    return [step for number, step in by_number.items() if number in numbers]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, check that it can be written and hold it, as two would undo each other."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        free = shutil.disk_usage(folder).free
    with file:
        if free < MINIMUM_FREE:
            raise DiffsegError(
                f"only {free / 1e6:.0f} MB are free in {folder}, less than {MINIMUM_FREE / 1e6:.0f} MB; "
                "free some space or set another out."
            )
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, also when it is killed
        except OSError:
            raise DiffsegError(f"another diffseg run is working in {folder}; wait for it or stop it.") from None
        yield


def print_results(folder: Path) -> None:
    """Print the table of a run's report and where its figures and summary lie."""
    report = folder / "06_report"
    if (report / "table.txt").is_file():
        print("\n" + (report / "table.txt").read_text(encoding="utf-8").rstrip() + "\n")
    figures = (read_manifest(report) or {}).get("metrics", {}).get("figures", [])
    for path in [*(report / figure for figure in figures), folder / "summary.json"]:
        if path.is_file():
            print(path)
