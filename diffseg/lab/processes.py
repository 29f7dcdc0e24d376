"""One run in several processes: by Accelerate, `accelerate launch --num_processes 4 -m diffseg run voc`, or by shares.

The main process (rank 0) runs the notebooks as ever; it alone holds the run's lock and writes manifests and executed
notebooks. When a notebook with cells tagged `together` begins it calls the others, and each runs the same notebook in a
kernel of its own, up to the last of these cells: there Accelerate finds them all. All work in the same folders: what
two of them write is the same, and whole or absent. An error ends its process, and the launcher ends the rest.

A job array needs no group: `diffseg run voc --only 3 --shard 3/16` draws the third of sixteen parts and waits for no
one. Whoever finds all parts there finishes the step.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError

# what a launcher tells its processes; a kernel that has none of it works alone
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
SHARD = "DIFFSEG_SHARD"  # "3/16" in the kernels of `--shard`
# The fast wait for the slow, who may have gigabytes to write and notebooks to finish, so this only ends what hangs (our
# choice). A launcher ends the processes of its machine at once when one of them fails.
WAIT = datetime.timedelta(days=7)


def count() -> int:
    """Return the number of processes that work together here, as a launcher's environment variables say; else 1."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Return this process's number, 0 for the main one."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def parse_shard(text: str) -> tuple[int, int]:
    """Return (3, 16) of "3/16": which part of how many, from 1. Raises DiffsegError for another text."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise DiffsegError(f"--shard is {text!r}; write the part and the number of parts, such as 3/16.")
    return int(found[1]), int(found[2])


def shard() -> tuple[int, int] | None:
    """Return this kernel's part of a job array, None where there is none."""
    return parse_shard(os.environ[SHARD]) if os.environ.get(SHARD) else None


def share() -> tuple[int, int]:
    """Return (index, number) of the part of a divided work that this process does, from 0, over shards and ranks."""
    part, parts = shard() or (1, 1)
    return (part - 1) * count() + rank(), parts * count()


def suffix(text: str) -> str:
    """Return what tells the executed notebook of a shard from the others'."""
    return f".{text.replace('/', '-of-')}" if text else ""


def meet() -> None:
    """In a kernel: wait until every process is here, and make Accelerate's group of them on the first call."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        # without a GPU Accelerate forms a group only where it is told that the CPU is meant
        PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT).wait_for_everyone()


class Group:
    """All processes of a run, in a `with` block; without a launcher a single one, for which every method is idle.

    Inside the block this process's environment is that of a process alone, and `together` restores it for a step.
    """

    def __enter__(self) -> "Group":
        self.count, self.variables = count(), {}
        if self.count > 1:
            from torch import distributed

            distributed.init_process_group("gloo", timeout=WAIT)
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
        """Main process: call the others to a notebook; within the block kernels find each other."""
        if self.count == 1 or not divided(notebook):
            yield
            return
        with socket.socket() as free:  # a new one for each step: the last step's main kernel has taken its own along
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        self.exchange([str(notebook), parameters, str(folder), port, os.environ.get(SHARD, "")])
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
    """Take part in the notebooks to which the main process calls, until its run is over; quiet, but for an error.

    Of each, this process's executed part lies in `<run>/notebooks` under its rank.
    """
    from diffseg.lab.kernel import execute  # here: others need not wait for papermill

    with Group() as group:
        while task := group.exchange():
            notebook, folder, rank = Path(task[0]), Path(task[2]), group.variables["RANK"]
            os.environ[SHARD] = task[4]  # the main process alone reads the arguments
            part = folder / "notebooks" / f"{notebook.stem}{suffix(task[4])}.rank-{rank}.ipynb"
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(json.dumps(divided(notebook)), encoding="utf-8")
            except OSError as error:
                raise DiffsegError(f"process {rank} cannot write {part} ({error.strerror}).") from None
            with group.environment(task[3]), open(os.devnull, "w") as nowhere:
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    execute(part, part, task[1], folder)
            part.unlink()


def divided(notebook: Path) -> dict | None:
    """Return the notebook up to its last cell tagged `together`; None where the main process does all of it."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    places = [k for k, cell in enumerate(content["cells"]) if "together" in cell["metadata"].get("tags", [])]
    return content | {"cells": content["cells"][: places[-1] + 1]} if places else None
