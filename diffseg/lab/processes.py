"""One run in several processes: `accelerate launch --num_processes 4 -m diffseg run voc`.

The main process (rank 0) runs the notebooks as ever; it alone holds the run's lock and writes manifests and executed
notebooks. When a step of TOGETHER begins it calls the others, and each runs the same notebook in a kernel of its own,
up to the last cell in which the work is divided: there Accelerate finds them all. The other steps are the main
process's. An error ends its process, and the launcher ends the rest: no one waits for a dead process.
"""

import contextlib
import datetime
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError

# step -> the last cell in which the work is divided, and what all processes share of the step's folder (files that a
# cut step goes on from and folders that all fill); anything else the others write is thrown away
TOGETHER = {
    "02_lora_tuning": (
        "tune",
        ("checkpoint.pt", "losses.csv", "pytorch_lora_weights.safetensors", "candidates/*/*"),
    ),
    "03_synthesis": ("all", ("JPEGImages/", "SegmentationClass/", "Reliability/")),
    "04_robust_training": ("real", ("synthetic.checkpoint.pt", "real.checkpoint.pt")),
    "05_evaluation": ("evaluate", ("predictions/",)),
}
# what a launcher tells its processes; a kernel that has none of it works alone
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
# A wait ends with an error after this time (our choice): kernels wait while one of them writes an index of 168,679
# pictures, runners while the main process does the rest of a step. A launcher ends the processes of its machine sooner.
KERNELS_WAIT = datetime.timedelta(hours=3)
RUNNERS_WAIT = datetime.timedelta(days=7)
SCRATCH = ".processes"


def count() -> int:
    """Return the number of processes that work together here, as a launcher's environment variables say; else 1."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Return this process's number, 0 for the main one."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def meet() -> None:
    """In a kernel: wait until every process is here, and make Accelerate's group of them on the first call."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        # without a GPU Accelerate forms a group only where it is told that the CPU is meant
        PartialState(cpu=not torch.cuda.is_available(), timeout=KERNELS_WAIT).wait_for_everyone()


def own_folder(folder: Path) -> Path:
    """Return the empty scratch folder in which this process, not the main one, takes part in the step of `folder`.

    What TOGETHER names is a link to the step's own file or folder, which need not be there yet.
    """
    own = folder.parent / SCRATCH / str(rank()) / folder.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    for name in TOGETHER[folder.name][1]:
        if name.endswith("/"):
            (folder / name).mkdir(exist_ok=True)
        for path in folder.glob(name) if "*" in name else [folder / name]:
            link = own / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return own


class Group:
    """All processes of a run, in a `with` block; without a launcher a single one, for which every method is idle.

    Inside the block this process's environment is that of a process alone, and `together` restores it for a step.
    """

    def __enter__(self) -> "Group":
        self.count, self.variables = count(), {}
        if self.count > 1:
            from torch import distributed

            distributed.init_process_group("gloo", timeout=RUNNERS_WAIT)
            self.variables = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
            self.is_main = self.variables["RANK"] == "0"
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.count > 1:
            if kind is None and self.is_main:
                self.exchange(None)
            os.environ.update(self.variables)

    def exchange(self, message: list | None = None) -> list | None:
        """Return the main process's message in every process; where that one has ended, end without a word."""
        from torch import distributed

        box = [message]
        try:
            distributed.broadcast_object_list(box)
        except RuntimeError:
            sys.exit(1)  # who failed has said why
        return box[0]

    @contextlib.contextmanager
    def together(self, notebook: Path, parameters: dict[str, Any], folder: Path) -> Iterator[None]:
        """Main process: call the others to a step; within the block kernels find each other."""
        if self.count == 1 or notebook.stem not in TOGETHER:
            yield
            return
        with socket.socket() as free:  # a new one for each step: the last step's main kernel has taken its own along
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        self.exchange([str(notebook), parameters, str(folder), port])
        with self.environment(port):
            yield

    @contextlib.contextmanager
    def environment(self, port: str) -> Iterator[None]:
        kept = {name: value for name, value in self.variables.items() if not name.startswith("TORCHELASTIC")}
        os.environ.update(kept | {"MASTER_PORT": port})
        try:
            yield
        finally:
            for name in kept.keys() | {"MASTER_PORT"}:
                os.environ.pop(name, None)


def assist() -> None:
    """Take part in the steps to which the main process calls, until its run is over; quiet, but for an error.

    What is left of this process after an error lies in `<run>/.processes/<rank>`.
    """
    from diffseg.lab.kernel import execute

    with Group() as group:
        while task := group.exchange():
            notebook, folder = Path(task[0]), Path(task[2])
            own = folder / SCRATCH / group.variables["RANK"]
            part = own / notebook.name
            try:
                own.mkdir(parents=True, exist_ok=True)
                part.write_text(json.dumps(first_cells(notebook)), encoding="utf-8")
            except OSError as error:
                raise DiffsegError(f"process {own.name} cannot write to {own} ({error.strerror}); delete it.") from None
            with group.environment(task[3]), open(os.devnull, "w") as nowhere:
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    execute(part, part, task[1], folder)
            shutil.rmtree(own)
            with contextlib.suppress(OSError):  # others are at work there
                own.parent.rmdir()


def first_cells(notebook: Path) -> dict:
    """Return the notebook up to the last cell in which the processes work together."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    last = TOGETHER[notebook.stem][0]
    ids = [cell.get("id") for cell in content["cells"]]
    if last not in ids:
        raise DiffsegError(f"{notebook} has no cell {last!r}; restore it with git, or change diffseg/processes.py.")
    content["cells"] = content["cells"][: ids.index(last) + 1]
    return content
