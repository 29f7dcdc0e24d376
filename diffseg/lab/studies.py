"""Studies: a YAML of configurations x seeds, made as ordinary runs that share their common steps.

notebooks/studies/NAME.yaml begins with a comment that says what it asks, and holds `base` (a name in
notebooks/params), `only` (notebooks), `seeds`, and `configurations`: name -> changed parameters. Each configuration x
seed is the run results/runs/NAME/<configuration>-<seed>.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import diffseg
from diffseg.errors import DiffsegError
from diffseg.lab.batch import (
    check_selected,
    named_file,
    resolve,
    select,
    step_notebooks,
    step_parameters,
    working_in,
)
from diffseg.lab.manifests import read_manifest
from diffseg.lab.parameters import read_yaml
from diffseg.lab.provenance import hardware
from diffseg.lab.runs import writing
from diffseg.lab.steps import STEPS, notebook_of, run_folder, step_folder, step_key, steps_of, upstream
from diffseg.paths import project_root

ENTRIES = ("base", "only", "seeds", "configurations")


@dataclass(frozen=True)
class StudyRun:
    """One configuration with one seed."""

    configuration: str
    seed: int
    changes: dict[str, Any]  # of the base's parameters, seed and run's name among them
    values: dict[str, Any]  # the base's and the changed parameters, checked
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    question: str  # the file's first comment
    base: str
    only: str
    seeds: list[int]
    configurations: dict[str, dict[str, Any]]
    runs: list[StudyRun]  # the seeds of a configuration follow one another
    steps: list[str]  # the steps of `only` and all that they stand on, in running order


def study_files() -> list[Path]:
    return sorted((project_root() / "notebooks" / "studies").glob("*.yaml"))


def load_study(name: str) -> Study:
    """Read notebooks/studies/<name>.yaml and check all of it, so that nothing is found out after an hour.

    Raises DiffsegError for an unknown study, entry, base, step or parameter and for a value of the wrong type.
    """
    path = named_file("studies", name, "study")
    entries = read_yaml(path)
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    question = " ".join(line.lstrip("# ") for line in lines).strip()

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise DiffsegError(f"{path.name} {sentence}")

    require(bool(question), "must begin with a comment that says what it asks.")
    for entry in entries:
        require(entry in ENTRIES, f"has an unknown entry {entry}; a study has {', '.join(ENTRIES)}.")
    base, only, seeds, configurations = (entries.get(entry) for entry in ENTRIES)
    require(isinstance(base, str) and not base.endswith((".yaml", ".yml")), "needs base: a name in notebooks/params.")
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    require(whole and seeds and len(set(seeds)) == len(seeds), "needs seeds: different whole numbers, as [0, 1, 2].")
    require(isinstance(configurations, dict) and configurations, "needs configurations: name -> changed parameters.")
    require(
        not (project_root() / "notebooks" / "params" / f"{name}.yaml").exists(),
        "has the name of a parameter file, whose run would lie in the same folder; rename it.",
    )
    notebooks = step_notebooks()
    selected = select(None if only is None else str(only), list(notebooks))
    needed = {step for title in selected for made in steps_of(notebooks[title]) for step in (made, *upstream(made))}
    runs = []
    for configuration, changes in configurations.items():
        changes = {} if changes is None else changes
        require(isinstance(changes, dict), f"gives the configuration {configuration} no parameters `name: value`.")
        for owned in ("run", "out", "seed"):
            require(owned not in changes, f"must not set {owned} in the configuration {configuration}: the study does.")
        for seed in seeds:
            changed = changes | {"seed": seed, "run": f"{name}/{configuration}-{seed}"}
            values, folder = resolve(base, changed, source=f"the configuration {configuration} of {path.name}")
            runs.append(StudyRun(str(configuration), seed, changed, values, folder))
    return Study(
        name=name,
        question=question,
        base=base,
        only=",".join(str(int(title[:2])) for title in selected),
        seeds=seeds,
        configurations={str(configuration): changes or {} for configuration, changes in configurations.items()},
        runs=runs,
        steps=[step for step in STEPS if step in needed],
    )


def run_study(name: str, jobs: int, write_results: Callable[[Study], None]) -> None:
    """Make a study's runs, `jobs` at the same time, and have its table written (`diffseg.lab.study_results`).

    Runs that are finished are left as they are, steps that other runs have made in the same way are linked. A run
    that fails does not keep the others from running; DiffsegError names it in the end.
    """
    study = load_study(name)
    if jobs < 1:
        raise DiffsegError(f"--jobs must be 1 or more, not {jobs}.")
    selected = select(study.only, list(step_notebooks()))
    for run in study.runs[:: len(study.seeds)]:  # before the first of them, which may take a day
        check_selected(selected, run.values, f"the configuration {run.configuration} of {name}.yaml")
    with working_in(run_folder(name)):
        failed = make_runs(study, jobs)
        if any(finished_steps(study, run) for run in study.runs):
            with writing(project_root() / "results"):
                write_results(study)
    if failed:
        raise DiffsegError(f"of the study {name}, {', '.join(failed)} failed; fix it and give the same command again.")


def make_runs(study: Study, jobs: int) -> list[str]:
    """Make each of the study's runs in a process, `jobs` at the same time, and return the names of those that failed.

    The processes divide the cores unless OMP_NUM_THREADS is set already, and the GPUs. With several jobs, what a run
    prints goes to <run>.log beside its folder. When this process is interrupted or terminated, it ends them first.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, hardware()["cores"] // jobs))} | os.environ
    environment |= {"DIFFSEG_ROOT": str(project_root())}  # the runs work in the package's folder
    devices = visible_devices() if jobs > 1 else []
    waiting, failed = list(study.runs), []
    working: dict[int, tuple[StudyRun, subprocess.Popen]] = {}  # by slot, 0 to jobs - 1
    try:
        while waiting or working:
            for slot in range(jobs):
                if waiting and slot not in working:
                    run = waiting.pop(0)
                    print(f"{run.name}: run {len(study.runs) - len(waiting)} of {len(study.runs)}", flush=True)
                    device = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                    working[slot] = run, start(study, run, environment | device, with_log=jobs > 1)
            time.sleep(0.1)
            for slot, (run, process) in list(working.items()):
                if process.poll() is not None:
                    del working[slot]
                    failed += [run.name] if process.returncode else []
                    where = f", see {run.folder}.log" if jobs > 1 else ""
                    print(f"{run.name}: " + (f"failed{where}" if process.returncode else "done"), flush=True)
    finally:
        for _, process in working.values():
            process.terminate()
        for _, process in working.values():
            process.wait()
    return failed


def visible_devices() -> list[str]:
    """Return the GPUs that a study may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without any."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device.strip() for device in listed.split(",") if device.strip()]
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    import torch  # here: it takes seconds to load, and a machine without a GPU need not wait

    return [str(index) for index in range(torch.cuda.device_count())]


def start(study: Study, run: StudyRun, environment: dict[str, str], with_log: bool) -> subprocess.Popen:
    """Start `diffseg run` for a run, of this very package."""
    changes = [f"{name}={json.dumps(value)}" for name, value in run.changes.items()]
    command = [sys.executable, "-m", "diffseg", "run", study.base, "--only", study.only, "--set", *changes]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.folder}.log", "w") if with_log else contextlib.nullcontext() as log:
        here = Path(diffseg.__file__).parents[1]
        return subprocess.Popen(command, cwd=here, env=environment, stdout=log, stderr=log and subprocess.STDOUT)


def finished_steps(study: Study, run: StudyRun) -> dict[str, Path] | None:
    """Return the folders of a run's steps when all are finished with its present parameters and code; else None."""
    keys: dict[str, str] = {}
    folders = {}
    for step in study.steps:
        keys[step] = step_key(step, step_parameters(notebook_of(step), run.values), keys)
        folders[step] = step_folder(step, keys[step], run.values.get("out", ""))
        if read_manifest(folders[step]) is None:
            return None
    return folders


def print_studies() -> None:
    """Print each study with its question and how many of its runs are finished."""
    for path in study_files():
        try:
            study = load_study(path.stem)
            done = sum(finished_steps(study, run) is not None for run in study.runs)
            print(f"{study.name:16}{f'{done} of {len(study.runs)} runs':16}{study.question}")
        except DiffsegError as error:
            print(f"{path.stem:16}{error}")
