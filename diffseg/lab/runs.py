"""A step from inside its notebook: `step = runs.begin("03_synthesis", globals())` ... `step.finish([...])`.

The step's folder is where its key says (`diffseg.lab.steps`); the run's folder gets a link to it. Killed at any moment,
a step leaves whole files only and continues with them. In a finished step the same cells find their results, and
nothing on disk changes.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.files import MANIFEST, temporary_beside
from diffseg.forking import prepare
from diffseg.lab import processes
from diffseg.lab.combinations import check_together
from diffseg.lab.declarations import check
from diffseg.lab.locks import RUNNER, acquire, run_lock, step_lock
from diffseg.lab.manifests import LISTING, damage, read_manifest, write_manifest
from diffseg.lab.parameters import declared
from diffseg.lab.provenance import as_json, git_state, hardware, versions
from diffseg.lab.steps import (
    difference,
    key_of,
    linked_keys,
    module_path,
    notebook_of,
    run_folder,
    step_folder,
    step_recipe,
    upstream,
)
from diffseg.paths import project_root

share, meet = processes.share, processes.meet  # for notebooks: this process's part of divided work, and the wait

_started = time.time()  # of this process; what it has imported is older
_held: dict[Path, Any] = {}  # locks of this process
_at_work: dict[Path, set[Path]] = {}  # run -> folders of its steps that this process has begun and not finished
_finished: list[float] = [0.0]  # when a step of this process was last finished: a notebook may make two in turn


@dataclass
class Step:
    """A step at work, as `begin` returns it to the notebook."""

    name: str
    folder: Path  # absolute; artefacts go here
    parameters: dict[str, Any]  # resolved and checked
    key: str
    recipe: dict[str, Any]  # what the key is made of
    finished: bool  # the folder holds the whole result already
    resumed: bool  # the folder holds a part of it
    run: Path  # the run's folder
    keys: dict[str, str]  # of the earlier steps of the run
    inputs: dict[str, dict] = field(default_factory=dict)  # step -> key and fingerprint of what was read
    started: float = field(default_factory=time.time)
    # as it is now: hours later there may be another commit
    git: dict | None = field(default_factory=lambda: git_state(project_root()))

    def input(self, step: str, name: str = ".") -> Path:
        """Return the path of an upstream step's output file, or of a folder of outputs ("." for all of them).

        A step that is not upstream or not finished, a name that is none of its outputs, and files that are missing or
        altered since raise DiffsegError.
        """
        if step not in upstream(self.name):
            raise DiffsegError(f"{self.name} does not stand on {step}; add it to STEPS in diffseg/lab/steps.py.")
        folder = self.folder.parents[1] / step / self.keys.get(step, "")
        manifest = read_manifest(folder) if step in self.keys else None
        if manifest is None:
            raise DiffsegError(f"{self.name} needs {step}, which is not finished in {self.run}; run that step first.")
        if step not in self.inputs and not processes.rank():
            if problem := trouble(folder):
                raise DiffsegError(f"{step} is not whole in {folder}: {problem}; run that step again.")
        if not (folder / name).exists():
            raise DiffsegError(f"{step} has no output {name} in {folder}; look at its {LISTING}.")
        self.inputs[step] = {"key": manifest["key"], "sha256": manifest["outputs"]["sha256"]}
        return folder / name

    def save_figure(self, figure, name: str) -> None:
        """Save a figure as <run>/figures/<number>_<name>.png and .pdf: it is the run's, no artefact of the step."""
        from diffseg.figures import save_figure  # here: it loads torch

        if not processes.rank():
            save_figure(figure, self.run / "figures" / f"{self.name[:2]}_{name}.png")

    def watcher(self, every: int, name: str, benchmark, data_root: str, device) -> Callable | None:
        """Return what writes a training to <run>/tensorboard/<name>; None if `every` is 0 or the step is finished.

        Like a figure it is the run's. Without a development split below `data_root` it writes the losses only.
        """
        if not every or self.finished or processes.rank():
            return None
        from diffseg.benchmarks.classes import DEVELOPMENT
        from diffseg.benchmarks.readers import data_folder, open_split
        from diffseg.lab.tensorboard import Watcher

        try:
            development = open_split(benchmark, data_folder(data_root), DEVELOPMENT)
        except DiffsegError as error:
            print(f"TensorBoard shows the losses only: {error}")
            development = None
        folder = self.run / "tensorboard" / name
        print(f"tensorboard --logdir {folder.parent}")
        return Watcher(folder, every, development, benchmark, device)

    def finish(
        self, outputs: Iterable[str | os.PathLike], metrics: dict[str, Any] | None = None, drop: Iterable[str] = ()
    ) -> dict:
        """Check the declared outputs, write the manifest as the last file of the step and return it.

        `outputs` are paths or globs relative to the folder. One that is absent, matches nothing or is an empty file
        raises DiffsegError. `metrics` may hold numbers, texts, lists, arrays, dictionaries; NaN becomes null. `drop`
        are globs of what only an interrupted step needs, removed in the end. Of a finished step nothing is written.
        """
        if processes.rank():
            return {"seconds": 0.0, "metrics": metrics or {}}
        if finished := read_manifest(self.folder):  # by an earlier run, or by another share of this one
            let_go(self.run, self.folder)
            return finished
        if key_of(now := step_recipe(self.name, self.parameters, self.keys)) != self.key:
            raise DiffsegError(
                f"{difference(self.recipe, now)} while {self.name} was at work, so some of its files may be of either. "
                f"Remove {self.folder} and run it again; or undo the change, if no process has read it, and the same "
                "command finishes the step."
            )
        names = {name for output in outputs for name in self._match(output)}
        content = {
            "step": self.name,
            "run": self.run.name,
            "key": self.key,
            "parameters": {name: value for name, value in self.parameters.items() if name not in ("run", "out")},
            "recipe": self.recipe,
            "versions": versions(),
            "git": self.git,
            "hardware": hardware(),
            "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat(),
            # of this attempt, when the step was resumed; the time of a step before it in the notebook does not count
            "seconds": round(time.time() - max(self.started, _finished[0]), 2),
            "resumed": self.resumed,
            "inputs": self.inputs,
            "metrics": as_json(metrics or {}),
        }
        with writing(self.folder):
            write_manifest(self.folder, names, content)
            manifest = read_manifest(self.folder)  # the first one's, where another share ended in the same moment
            for path in [path for pattern in drop for path in self.folder.glob(pattern)]:
                path.unlink()
        _finished[0] = time.time()
        let_go(self.run, self.folder)
        return manifest

    def _match(self, output: str | os.PathLike) -> list[str]:
        pattern = os.path.relpath(self.folder / output, self.folder)
        if pattern.startswith(".."):
            raise DiffsegError(f"{self.name} declares the output {output}, which lies outside {self.folder}.")
        paths = [self.folder / pattern] if (self.folder / pattern).is_file() else self.folder.glob(pattern)
        files = [p for p in paths if p.is_file() and p.name not in (MANIFEST, LISTING) and p.name[0] != "."]
        if not files:
            raise DiffsegError(f"{self.name} declares the output {output} but has not written it in {self.folder}.")
        for path in files:
            if path.stat().st_size == 0:
                raise DiffsegError(f"{self.name} has written an empty file {path}; delete it and run the step again.")
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise DiffsegError(f"{path}, an output of {self.name}, is a link to a place outside its folder.")
        return [path.relative_to(self.folder).as_posix() for path in files]


def begin(step_name: str, namespace: dict[str, Any]) -> Step:
    """Open a step from its notebook.

    Takes the values of the declared parameters from `namespace`, checks them and puts them back converted. The folder
    keeps what an earlier attempt with the same key made. Raises DiffsegError on a wrong value, an upstream step that
    the run has not, an altered result, an unwritable folder, code that was edited since it was imported, and while
    another process makes this step.
    """
    notebook = notebook_of(step_name)
    defaults = declared(notebook)
    if missing := [name for name in (*defaults, "run", "out") if name not in namespace]:
        raise DiffsegError(f"{step_name} misses the parameter {missing[0]}; run its parameters cell first.")
    parameters = check({name: namespace[name] for name in defaults}, defaults, notebook.name)
    check_together(parameters, notebook.name)
    namespace.update(parameters)
    run, out = run_folder(namespace["run"], namespace["out"]), namespace["out"]
    keys = linked_keys(run)
    if problem := mixture(run, upstream(step_name)):
        raise DiffsegError(f"{problem}; run that notebook, and those after it, before {step_name}.")
    recipe = step_recipe(step_name, parameters, keys)
    if edited := [m for m in recipe["code"] if m in sys.modules and module_path(m).stat().st_mtime > _started]:
        raise DiffsegError(
            f"{edited[0]} was edited since this kernel imported it; restart the kernel, and begin again."
        )
    key = key_of(recipe)
    folder = step_folder(step_name, key, out)
    if processes.rank():
        processes.meet()  # the main process sorts out what is there
        return Step(step_name, folder, parameters, key, recipe, bool(read_manifest(folder)), False, run, keys)
    with writing(folder):
        try:
            if RUNNER not in os.environ:
                take(run, folder)
            problem = trouble(folder)
        except DiffsegError:
            let_go(run, folder)
            raise
        # a shard's time is not the step's: others draw beside it
        resumed = processes.shard() is not None or (folder.is_dir() and any(folder.iterdir()))
        folder.mkdir(parents=True, exist_ok=True)
        if problem:
            for name in (MANIFEST, LISTING):  # of a step with missing files: it is not finished any more
                (folder / name).unlink(missing_ok=True)
            if processes.shard() is None:  # a killed attempt leaves temporary files; those of other shares are at work
                for path in folder.rglob(".*.tmp*"):
                    path.unlink(missing_ok=True)
        link(run / step_name, folder)
        if not problem:
            let_go(run, folder)
    processes.meet()
    if problem and (parameters.get("workers") or parameters.get("threads")):
        prepare()  # of the processes that the step will start, beside its first cells
    return Step(step_name, folder, parameters, key, recipe, not problem, bool(problem) and resumed, run, keys)


def take(run: Path, folder: Path) -> None:
    """Take the locks of a run and of a step of it, and give back that of the same step with other parameters."""
    begun = _at_work.setdefault(run, set())
    for earlier in [each for each in begun if each.parent == folder.parent and each != folder]:
        let_go(run, earlier)
    begun.add(folder)
    for path, busy in (run_lock(run), step_lock(folder)):
        _held[path] = _held.get(path) or acquire(path, busy)


def let_go(run: Path, folder: Path) -> None:
    """Give back a step's lock, and its run's with that of the last step at work: a kernel may stay open for days."""
    _at_work.get(run, set()).discard(folder)
    for path, _ in (step_lock(folder), *([] if _at_work.get(run) else [run_lock(run)])):
        if path in _held:
            _held.pop(path).close()


def mixture(run: Path, steps: Iterable[str]) -> str:
    """Say which of these steps of a run was made from another step than the run links to by now; "" if none was."""
    keys = linked_keys(run)
    for step in steps:
        for name, key in (read_manifest(run / step) or {}).get("recipe", {}).get("upstream", {}).items():
            if keys.get(name) != key:
                return f"{step} in {run} was made from another {name} than the present one"
    return ""


def trouble(folder: Path, verify: bool = False) -> str:
    """Say why a step must be made, or made whole; "" when it is finished. An altered file raises DiffsegError.

    verify: hash every file, in place of looking at sizes and times.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return "it is not finished"
    missing, altered = damage(folder, manifest, verify)
    if altered:
        raise DiffsegError(
            f"{folder / altered[0]} was altered since its step finished ({len(altered)} files in all); restore it, or "
            "remove it to have it made again."
        )
    return f"its file {missing[0]} is missing" if missing else ""


def link(place: Path, folder: Path) -> None:
    """Let `place` in a run's folder be a relative link to a step's folder, in the place of an earlier link."""
    if place.is_dir() and not place.is_symlink():
        raise DiffsegError(f"{place} is a folder, where a link belongs; move it away (diffseg 0.2 kept steps there).")
    target = os.path.relpath(folder, place.parent)
    if not (place.is_symlink() and os.readlink(place) == target):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(place)
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, place)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in a folder's place into one sentence."""
    try:
        yield
    except OSError as error:
        raise DiffsegError(
            f"cannot write to {folder} ({error.strerror or error}); free some space or set another out."
        ) from None
