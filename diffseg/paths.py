"""Where the project lies, and what the short names of parameters stand for."""

import os
from collections.abc import Callable
from pathlib import Path

from diffseg.errors import DiffsegError

# parameter -> name -> the place that it stands for. "mini" is registered by `diffseg.miniworld`, and nowhere else.
_SHORT_NAMES: dict[str, dict[str, Callable[[], Path]]] = {}


def project_root() -> Path:
    """Return the folder that holds `notebooks/`: DIFFSEG_ROOT if set, else the clone of this package."""
    root = Path(os.environ.get("DIFFSEG_ROOT") or Path(__file__).parents[1]).resolve()
    if not (root / "notebooks").is_dir():
        raise DiffsegError(f"there is no notebooks folder in {root}; install diffseg from its clone with pip -e.")
    return root


def register(name: str, **places: Callable[[], Path]) -> None:
    """Let `name` stand for a place in each of the named parameters; a place may be made when it is first asked for."""
    for parameter, place in places.items():
        _SHORT_NAMES.setdefault(parameter, {})[name] = place


def is_short_name(parameter: str, value: str) -> bool:
    return value in _SHORT_NAMES.get(parameter, {})


def locate(parameter: str, value: str) -> Path:
    """Return the place that a parameter's value names: a registered short name's, or a path.

    A relative path counts from the project's root, so that it means the same in every notebook and process. The place
    need not exist.
    """
    if is_short_name(parameter, value):
        return _SHORT_NAMES[parameter][value]()
    return project_root() / Path(value).expanduser()
