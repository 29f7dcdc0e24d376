"""Studies: a YAML of configurations x seeds, made as ordinary runs that share their common steps.

notebooks/studies/NAME.yaml begins with a comment that says what it asks, and holds `base` (a name in
notebooks/params), `only` (steps), `seeds`, and `configurations`: name -> changed parameters. Each configuration x
seed is the run results/runs/NAME/<configuration>-<seed>.
"""

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffseg
from diffseg.errors import DiffsegError
from diffseg.lab.manifests import WHERE, hardware, read_manifest, run_folder, step_key, upstream
from diffseg.lab.parameters import read_yaml
from diffseg.lab.runs import locked, resolve, select, step_notebooks, step_parameters, writing
from diffseg.paths import project_root

ENTRIES = ("base", "only", "seeds", "configurations")


@dataclass(frozen=True, eq=False)  # compared by identity, to be a key
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

    @property
    def folder(self) -> Path:
        return run_folder(self.name)


def study_files() -> list[Path]:
    return sorted((project_root() / "notebooks" / "studies").glob("*.yaml"))


def load_study(name: str) -> Study:
    """Read notebooks/studies/<name>.yaml and check all of it, so that nothing is found out after an hour.

    Raises DiffsegError for an unknown study, entry, base, step or parameter and for a value of the wrong type.
    """
    names = [path.stem for path in study_files()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}."
        raise DiffsegError(f"there is no study named {name} in notebooks/studies; {hint}")
    path = project_root() / "notebooks" / "studies" / f"{name}.yaml"
    entries = read_yaml(path)
    first = path.read_text(encoding="utf-8").partition("\n")[0]

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise DiffsegError(f"{path.name} {sentence}")

    require(first.startswith("# "), "must begin with a comment that says what it asks.")
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
    study_runs = []
    for configuration, changes in configurations.items():
        source = f"the configuration {configuration} of {path.name}"
        changes = {} if changes is None else changes
        require(isinstance(changes, dict), f"gives the configuration {configuration} no parameters `name: value`.")
        for own in (*WHERE, "seed"):
            require(own not in changes, f"must not set {own} in the configuration {configuration}: the study does.")
        for seed in seeds:
            changed = changes | {"seed": seed, "run": f"{configuration}-{seed}"}
            values, folder = resolve(base, changed, str(run_folder(name)), source)
            study_runs.append(StudyRun(str(configuration), seed, changed, values, folder))
    return Study(
        name=name,
        question=first.lstrip("# ").strip(),
        base=base,
        only=",".join(str(int(step[:2])) for step in selected),
        seeds=seeds,
        configurations={str(configuration): changes or {} for configuration, changes in configurations.items()},
        runs=study_runs,
        steps=[s for s in notebooks if s in selected or any(s in upstream(later) for later in selected)],
    )


def run_study(name: str, jobs: int = 1) -> None:
    """Make a study's runs, `jobs` at the same time, and write and print its table.

    Runs that are finished are left as they are, steps that other runs have made in the same way are linked. A run
    that fails does not keep the others from running; DiffsegError names it in the end.
    """
    study = load_study(name)
    if jobs < 1:
        raise DiffsegError(f"--jobs must be 1 or more, not {jobs}.")
    from diffseg.lab.study_results import write_results  # here: the command line need not wait for matplotlib

    with locked(study.folder):
        failed = make_runs(study, jobs)
        if any(finished(study, run) for run in study.runs):
            with writing(project_root() / "results"):
                write_results(study)
    if failed:
        raise DiffsegError(f"of the study {name}, {', '.join(failed)} failed; mend it and give the same command again.")


def make_runs(study: Study, jobs: int) -> list[str]:
    """Run each of the study's runs in a process of its own and return the names of those that failed.

    The processes divide the cores unless OMP_NUM_THREADS is set already. With several jobs, what a run prints
    goes to <run>.log beside its folder. When this process is interrupted or terminated, it ends them first.
    """
    threads = str(max(1, hardware()["cores"] // jobs))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    waiting, working, failed = list(study.runs), {}, []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                print(f"{run.name}: run {len(study.runs) - len(waiting)} of {len(study.runs)}", flush=True)
                working[run] = start(study, run, environment, log_of(run) if jobs > 1 else None)
            time.sleep(0.1)
            for run in [run for run, process in working.items() if process.poll() is not None]:
                if working.pop(run).returncode:
                    failed.append(run.name)
                    print(f"{run.name}: failed" + (f", see {log_of(run)}" if jobs > 1 else ""), flush=True)
                else:
                    print(f"{run.name}: done", flush=True)
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    return failed


def start(study: Study, run: StudyRun, environment: dict[str, str], log: Path | None) -> subprocess.Popen:
    """Start `diffseg run` for a run; `log` takes what it prints."""
    changes = [f"{name}={json.dumps(value)}" for name, value in run.changes.items()]
    command = [sys.executable, "-m", "diffseg", "run", study.base, "--only", study.only, "--share"]
    command += ["--out", str(study.folder), "--set", *changes]
    here = Path(diffseg.__file__).parents[1]  # so that it is this very package
    if log is None:
        return subprocess.Popen(command, cwd=here, env=environment)
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=here, env=environment, stdout=file, stderr=subprocess.STDOUT)


def log_of(run: StudyRun) -> Path:
    return run.folder.with_name(f"{run.name}.log")


def finished(study: Study, run: StudyRun) -> dict[str, dict] | None:
    """Return a run's manifests by step when it has all of them, made from its present parameters; else None."""
    notebooks = step_notebooks()
    manifests = {}
    for step in study.steps:
        manifest = read_manifest(run.folder / step)
        if manifest is None or manifest["key"] != step_key(
            step, step_parameters(notebooks[step], run.values), run.folder
        ):
            return None
        manifests[step] = manifest
    return manifests


def print_studies() -> None:
    """Print each study with its question and how many of its runs are finished."""
    for path in study_files():
        try:
            study = load_study(path.stem)
            done = sum(finished(study, run) is not None for run in study.runs)
            print(f"{study.name:16}{f'{done} of {len(study.runs)} runs':16}{study.question}")
        except DiffsegError as error:
            print(f"{path.stem:16}{error}")
