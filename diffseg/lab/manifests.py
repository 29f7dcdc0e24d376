"""Steps, run folders and manifests: what a step was made from, by what, and whether it still holds."""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffseg
from diffseg.errors import DiffsegError
from diffseg.files import sha256_file
from diffseg.lab import processes
from diffseg.lab.parameters import is_parameters, read_cells
from diffseg.paths import project_root

# step -> the steps whose artefacts it reads directly, in running order
STEPS = {
    "01_prompt_augmentation": [],
    "02_lora_tuning": [],
    "03_synthesis": ["01_prompt_augmentation", "02_lora_tuning"],
    "04_robust_training": ["03_synthesis"],
    "05_evaluation": ["04_robust_training"],
    "06_report": [
        "01_prompt_augmentation",
        "02_lora_tuning",
        "03_synthesis",
        "04_robust_training",
        "05_evaluation",
    ],
}
MANIFEST = "manifest.json"
UNFINISHED = "it is not finished"
# Parameters that may name a file or folder of the user's, whose bytes enter the key. `data_root` is none of them: a
# benchmark is a fixed thing of many gigabytes.
FILES = ("caption_file", "generator", "initial_network", "reference_network", "sam_checkpoint", "target_images")
WHERE = ("run", "out")  # parameters that say where a run lies, not what it is: they do not enter the key
PACKAGES = (
    "torch torchvision diffusers transformers peft accelerate segment-anything segmentation-models-pytorch "
    "torchmetrics papermill jupyterlab ipykernel numpy pillow matplotlib safetensors"
).split()


def notebook_path(step: str) -> Path:
    return project_root() / "notebooks" / f"{step}.ipynb"


def run_folder(run: str, out: str = "") -> Path:
    """Return `<out>/<run>`, absolute.

    An empty `out` is results/runs; a relative one counts from the project root, so that it means the same in
    the runner, in papermill and in JupyterLab.
    """
    if not re.fullmatch(r"\w[\w.-]*", run):
        raise DiffsegError(f"the run's name must be made of letters, digits, '.', '_' and '-', not {run!r}.")
    return Path(os.path.abspath(project_root() / Path(out or "results/runs").expanduser() / run))


def upstream(step: str) -> set[str]:
    """Return every step that `step` depends on, directly or not."""
    direct = STEPS.get(step, [])
    return set(direct).union(*(upstream(name) for name in direct))


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """Return the manifest in a step's folder, or None when there is none or it is not whole."""
    manifest = read_json(Path(folder) / MANIFEST)
    return manifest if manifest and {"key", "outputs", "parameters"} <= manifest.keys() else None


def read_json(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def altered(folder: Path, manifest: dict) -> list[str]:
    """Return the outputs of a finished step that are missing or no longer have their recorded bytes."""
    outputs = manifest["outputs"].items()
    return [name for name, sha in outputs if not (folder / name).is_file() or sha256_file(folder / name) != sha]


def named_files(parameters: dict[str, Any]) -> dict[str, str]:
    """Return path -> sha256 of the files that parameters of FILES name, of a folder all that are not hidden.

    A path begins as the parameter's value does; relative ones count from the project root. What is no file or folder,
    as a name such as "mini" or a hub id, adds nothing.
    """
    found = {}
    for value in filter(None, map(parameters.get, FILES)):
        place = project_root() / value
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            inside = path.relative_to(place)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                stat = path.stat()
                found[str(Path(value) / inside)] = _fingerprint(path, stat.st_size, stat.st_mtime_ns)
    return found


@functools.cache
def _fingerprint(path: Path, size: int, modified: int) -> str:
    """Return a file's sha256; gigabytes of weights are read once, not for every step that names them."""
    return sha256_file(path)


def step_key(step: str, parameters: dict[str, Any], run: Path) -> str:
    """Return the sha256 (hex) of all that decides what a step makes.

    That is: the notebook's code without its parameters cell, the resolved parameters but those of WHERE, the bytes
    of the files that they name (`named_files`), the package's version, and the keys and output hashes of the direct
    upstream steps in the run's folder `run`. An upstream step that is not finished raises DiffsegError.
    """
    before = {}
    for name in STEPS.get(step, []):
        manifest = read_manifest(run / name)
        if manifest is None:
            raise DiffsegError(f"{step} needs {name}, which is not finished in {run}; run that step first.")
        before[name] = [manifest["key"], manifest["outputs"]]
    cells = read_cells(notebook_path(step))
    recipe = {
        "code": [cell["source"] for cell in cells if cell["cell_type"] == "code" and not is_parameters(cell)],
        "parameters": {name: value for name, value in parameters.items() if name not in WHERE},
        "version": diffseg.__version__,
        "upstream": before,
    }
    if files := named_files(parameters):
        recipe["files"] = files
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def trouble(folder: Path, key: str, parameters: dict[str, Any]) -> str:
    """Say why the step in `folder` must run to have `key`: UNFINISHED, stale or damaged; "" when it holds."""
    manifest = read_manifest(folder)
    if manifest is None:
        return UNFINISHED
    if manifest["key"] != key:
        old, read = manifest["parameters"], manifest.get("inputs", {})
        names = [name for name in parameters if name not in WHERE and parameters[name] != old.get(name)]
        names += [path for path, sha in named_files(parameters).items() if read.get(path) != sha][:1]
        return f"{', '.join(names)} changed" if names else "its notebook, the package or an earlier step changed"
    damaged = altered(folder, manifest)
    return f"its file {damaged[0]} is missing or altered" if damaged else ""


def versions() -> dict[str, str | None]:
    """Return the versions of Python, diffseg and the packages it stands on; None for an absent one."""
    found: dict[str, str | None] = {"python": platform.python_version(), "diffseg": diffseg.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def provenance() -> dict[str, Any]:
    """Return {"versions", "git", "hardware"}: by which code, machine and packages a result is made now."""
    return {"versions": versions(), "git": git_state(project_root()), "hardware": hardware()}


def git_state(root: Path) -> dict | None:
    """Return {"revision", "dirty"} of the repository whose top is `root`, None when it is not one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top, revision = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        dirty = bool(git("status", "--porcelain"))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "dirty": dirty} if Path(top).resolve() == root else None


def machine_name(machine: dict[str, Any]) -> str:
    """Return a manifest's hardware in words: its GPUs, or without any its cores and their kind."""
    cores = machine["cores"]
    return ", ".join(machine["gpus"]) or f"{cores} {'core' if cores == 1 else 'cores'} of {machine['cpu']}"


def hardware() -> dict[str, Any]:
    """Return CPU model, usable cores, OMP_NUM_THREADS or "", number of processes that work together, memory in GB
    (1e9 bytes), GPU names if torch is loaded."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    torch = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model.group(1) if model else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),  # few of them when runs share the cores
        "processes": processes.count(),  # that worked together
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
    }


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: arrays and tensors as lists, NaN and infinities as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
