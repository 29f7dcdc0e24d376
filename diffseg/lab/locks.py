"""Locks on files, which end with the process that holds them, also when it is killed."""

from pathlib import Path
from typing import TextIO

from diffseg.errors import DiffsegError

try:
    import fcntl
except ImportError:  # Windows; `acquire` says so
    fcntl = None

RUNNER = "DIFFSEG_RUNNER"  # set in the kernels of `diffseg run`, which holds the locks itself


def acquire(path: Path, busy: str, shared: bool = False, waiting: str = "") -> TextIO:
    """Return the open file that holds the lock; closing it, or leaving its `with` block, gives the lock back.

    Where another process holds it, `waiting` is printed and the lock waited for; without `waiting` DiffsegError says
    `busy`. Holders of a shared lock keep out those who want it alone, not each other.
    """
    if fcntl is None:
        raise DiffsegError("runs need the file locks and links of Linux or macOS; on Windows work in WSL.")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # NFS lets only those who may read share a lock
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waiting:
            file.close()
            raise DiffsegError(busy) from None
        print(waiting, flush=True)
        fcntl.flock(file, kind)
    except OSError as error:
        file.close()
        raise DiffsegError(
            f"{path} cannot be locked ({error.strerror}); set out to a file system that has locks."
        ) from None
    return file


def run_lock(run: Path) -> tuple[Path, str]:
    """Return the lock of a run and what to say when another process holds it: two would undo each other's links."""
    return (
        run / ".lock",
        f"another diffseg run, or a notebook, is working in {run}; wait for it, or stop it (of a notebook its kernel).",
    )


def step_lock(folder: Path) -> tuple[Path, str]:
    """Return the lock of making a step, and what to say when another process holds it."""
    return folder.parent / ".locks" / folder.name, f"another process is making {folder}; wait for it or stop it."
