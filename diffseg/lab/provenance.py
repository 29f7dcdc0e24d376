"""By which code, machine and packages a result was made."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

import diffseg
from diffseg.lab import processes
from diffseg.paths import project_root

PACKAGES = (
    "torch torchvision diffusers transformers peft accelerate segment-anything segmentation-models-pytorch "
    "papermill jupyterlab ipykernel numpy pillow matplotlib safetensors"
).split()


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
        "processes": processes.share()[1],  # that worked together, over shards and ranks
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
    }


def as_json(value: Any) -> Any:
    """Return `value` as JSON can hold it: arrays and tensors as lists, NaN and infinities as None."""
    return to_jsonable_python(
        value, inf_nan_mode="null", fallback=lambda other: other.tolist() if hasattr(other, "tolist") else str(other)
    )
