"""`diffseg init FOLDER`: notebooks and parameter files to work with, for a package installed without a clone."""

import contextlib
import shlex
import shutil
from pathlib import Path

import diffseg
from diffseg.errors import DiffsegError
from diffseg.lab.runs import writing
from diffseg.paths import from_home, project_root


def init(folder: str) -> Path:
    """Write notebooks/ and results/published.csv (which the report reads) to a folder, and return it.

    They come from the installed package, in a clone from the clone. A folder that has one of them is refused, so that
    nobody's changes are lost.
    """
    source = Path(diffseg.__file__).parent / "working_copy"  # setup.py puts it into the wheel
    source = source if source.is_dir() else project_root()
    target = from_home(folder).absolute()
    for name in ("notebooks", "results/published.csv"):
        if (target / name).exists():
            raise DiffsegError(f"{target / name} is there already; give another folder, or move it away.")
    with writing(target):
        shutil.copytree(source / "notebooks", target / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__"))
        (target / "results").mkdir(exist_ok=True)
        shutil.copy(source / "results" / "published.csv", target / "results")
    return target


def entry(folder: Path) -> str:
    """Return what to type to work in a folder of `init`; a clone, or DIFFSEG_ROOT as it is set, would go before it."""
    with contextlib.chdir(folder):
        is_root = project_root().samefile(folder)
    return f"cd {shlex.quote(str(folder))}" + ("" if is_root else ', export DIFFSEG_ROOT="$PWD"')
