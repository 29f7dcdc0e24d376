"""Where the project lies, and what the short names of parameters stand for."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from diffseg.errors import DiffsegError

# (parameter, name) -> the place that it stands for, and the files that decide its bytes where these are not the place's
# own. "mini" is registered by `diffseg.miniworld`, and nowhere else.
_SHORT_NAMES: dict[tuple[str, str], tuple[Callable[[], Path], Sequence[Path]]] = {}


def project_root() -> Path:
    """Return the folder that holds `notebooks/`: DIFFSEG_ROOT if set, else the clone of this package; where there is no
    clone, the nearest folder at or above the working directory that `diffseg init` wrote."""
    given = os.environ.get("DIFFSEG_ROOT")
    root = Path(given or Path(__file__).parents[1]).resolve()
    if (root / "notebooks").is_dir():
        return root
    for above in () if given else (Path.cwd(), *Path.cwd().parents):
        if (above / "notebooks" / "params").is_dir():
            return above
    place = root if given else f"{Path.cwd()} or above"
    raise DiffsegError(
        f"there is no notebooks folder in {place}; write one with `diffseg init FOLDER` and work in that folder."
    )


def base_folder() -> Path:
    """Return the folder that relative paths of parameters count from: the project's root, or where there is no clone
    (the package alone is installed) the working directory."""
    try:
        return project_root()
    except DiffsegError:
        return Path.cwd()


def register(parameter: str, name: str, place: Callable[[], Path], made_of: Sequence[Path] = ()) -> None:
    """Let `name` stand for a place in a parameter; with `made_of`, the files it is made from when first asked for."""
    _SHORT_NAMES[parameter, name] = place, made_of


def is_short_name(parameter: str, value: str) -> bool:
    return (parameter, value) in _SHORT_NAMES


def sources(parameter: str, value: str) -> Sequence[Path]:
    """Return the files that a short name's place is made from; none for a place that is there, and for other values."""
    return _SHORT_NAMES[parameter, value][1] if is_short_name(parameter, value) else ()


def locate(parameter: str, value: str) -> Path:
    """Return the place that a parameter's value names: a registered short name's, or a path.

    A relative path counts from `base_folder`, so that it means the same in every notebook and process. The place need
    not exist.
    """
    if is_short_name(parameter, value):
        return _SHORT_NAMES[parameter, value][0]()
    return base_folder() / from_home(value)


def from_home(value: str) -> Path:
    """Return a path with the home folder in place of `~`; a user who is not there raises a DiffsegError."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise DiffsegError(f"{value} names the home of a user who is not here; write the folder in full.") from None
