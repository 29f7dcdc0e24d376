"""Steps that several runs have in common: made once by one run, linked by the others."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.lab.manifests import MANIFEST, altered, read_manifest, run_folder, step_key


def link(folder: Path, key: str) -> str:
    """Put in a step folder's place a relative link to an unaltered step of the same key; return its run's name.

    Looked for in results/runs and one level below (a study's runs); "" when there is none.
    """
    everywhere = run_folder("any").parent
    for pattern in (f"*/{folder.name}", f"*/*/{folder.name}"):
        for other in sorted(everywhere.glob(pattern)):
            manifest = None if other.is_symlink() or other == folder else read_manifest(other)
            if manifest and manifest["key"] == key and not altered(other, manifest):
                remove(folder)
                folder.symlink_to(os.path.relpath(other, folder.parent), target_is_directory=True)
                return os.path.relpath(other.parent, everywhere)
    return ""


def remove(folder: Path) -> None:
    """Remove a step's folder; of a link only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def claimed(key: str, title: str) -> Iterator[None]:
    """Hold the right to make the step of a key, so that two runs at the same time do not make it twice."""
    folder = run_folder("any").parent / ".making"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / key, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, also when it is killed
        except OSError:
            print(f"{title}, waits for another run that makes the same", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def confirm(folder: Path, key: str, parameters: dict[str, Any]) -> None:
    """Undo the finish of a step whose earlier steps changed meanwhile: it may have read half of each.

    The lock on a run's folder does not prevent that, as an earlier step may be a link to another run's.
    """
    with contextlib.suppress(DiffsegError):
        if step_key(folder.name, parameters, folder.parent) == key:
            return
    (folder / MANIFEST).unlink()
    raise DiffsegError(f"a step before {folder.name} changed while it ran in {folder.parent}; run it again.")
