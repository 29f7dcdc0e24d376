"""The one command that removes results: steps that no run refers to."""

import os
import shutil
import sys
from pathlib import Path

from diffseg.errors import DiffsegError
from diffseg.lab.locks import acquire, step_lock
from diffseg.lab.manifests import read_manifest
from diffseg.lab.steps import results_folder


def clean(out: str = "", agreed: bool = False) -> list[Path]:
    """List the step folders that no run refers to, with their sizes, ask, remove them and return them.

    Finished or not makes no difference. A step that a referred one was made from stays, and so does one that is being
    made. Without a terminal and without `agreed` nothing is removed.
    """
    results = results_folder(out)
    unused = sorted(all_steps(results) - referred(results))
    for folder in unused:
        is_whole = "" if read_manifest(folder) else ", unfinished"
        print(f"{size_of(folder) / 1e6:10.1f} MB  {folder.relative_to(results)}{is_whole}")
    if not unused:
        print(f"every step in {results / 'steps'} belongs to a run; to free it, remove that run's folder first")
        return []
    if not agreed:
        if not sys.stdin.isatty():
            raise DiffsegError("nothing was removed; give --yes to remove these folders without being asked.")
        if input(f"Remove these {len(unused)} folders? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return []
    removed = []
    for folder in unused:
        try:
            lock = acquire(*step_lock(folder))
        except DiffsegError as error:
            print(error)
            continue
        with lock:
            if folder not in referred(results):  # a run may have taken it up since
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def all_steps(results: Path) -> set[Path]:
    return {path for path in (results / "steps").glob("*/[!.]*") if path.is_dir()}


def referred(results: Path) -> set[Path]:
    """Return the step folders that runs link to, and those from which these were made."""
    runs = results / "runs"
    links = [link for pattern in ("*/*", "*/*/*") for link in runs.glob(pattern) if link.is_symlink()]
    queue = [Path(os.path.normpath(link.parent / link.readlink())) for link in links]
    found: set[Path] = set()
    while queue:
        folder = queue.pop()
        if folder not in found:
            found.add(folder)
            manifest = read_manifest(folder) or {}
            queue += [results / "steps" / n / key for n, key in manifest.get("recipe", {}).get("upstream", {}).items()]
    return found & all_steps(results)


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder; what links point to does not count."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
