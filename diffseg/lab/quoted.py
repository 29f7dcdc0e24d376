"""Numbers in prose that come from a file of results/: `84.1<!-- mini-voc/summary.json; miou_real * 100 -->`.

The comment directly behind a number names its cell; no reader sees it. `diffseg publish` writes the numbers again, and
a test compares. After the file, below results/, it says where the number stands, divided by `; `: in JSON a key or
position each, in a CSV file and in a JSON list of objects `column=value` until one row is left, then its column. At the
end there may be a factor, ` * 100` for a share in % or ` / 3600`. A number keeps its decimals and its commas. Of
`84.0 ± 0.2<!-- ...; miou -->` the second number is that of the column `miou_spread`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.files import read_rows

SIGN = r"(?:(?<!\d)-)?"  # a hyphen between digits is none
NUMBER = rf"{SIGN}\d[\d,]*(?:\.\d+)?"
QUOTED = re.compile(
    rf"(?P<mean>{NUMBER})(?: ± (?P<spread>{NUMBER}))?<!-- (?P<file>[^ ;]+\.(?:csv|json)); (?P<cell>.+?) -->"
)
DECIMAL = re.compile(rf"{SIGN}\d+\.\d+")
FACTOR = re.compile(r" ([*/]) ([\d.]+(?:e\d+)?)$")


def with_numbers(text: str, results: Path) -> str:
    """Return a page's text with every quoted number as it stands in its file below `results` today.

    Raises a DiffsegError that names the cell that is not there, or is no number.
    """

    def fill(match: re.Match) -> str:
        file, cell = match["file"], match["cell"]
        parts = ((match["mean"], ""), (match["spread"], "_spread"))
        numbers = [number(old, results, file, cell, suffix) for old, suffix in parts if old]
        return f"{' ± '.join(numbers)}<!-- {file}; {cell} -->"

    return QUOTED.sub(fill, text)


def with_cells(text: str, results: Path, file: str, cells: str) -> str:
    """Return a text without comments, its decimals in order as they stand in the cells of one file, divided by ` | `.

    Raises a DiffsegError as `with_numbers` does, and for more or fewer cells than decimals.
    """
    named = cells.split(" | ") if cells else []
    count = len(DECIMAL.findall(text))
    if count != len(named):
        raise DiffsegError(f"{text!r} has {count} decimals and {len(named)} cells of {file}; name one cell for each.")
    left = iter(named)
    return DECIMAL.sub(lambda match: number(match[0], results, file, next(left)), text)


def number(old: str, results: Path, file: str, cell: str, suffix: str = "") -> str:
    """Return the number that a cell holds today, with the decimals and commas of an old one."""
    found = value(results, file, cell, suffix)
    return f"{found:{',' if ',' in old else ''}.{len(old.partition('.')[2])}f}"


def value(results: Path, file: str, cell: str, suffix: str = "") -> float:
    """Return the number that a cell holds today, in the column with that suffix; none there raises a DiffsegError."""
    scaled = FACTOR.search(cell)
    factor = float(scaled[2]) ** (1 if scaled[1] == "*" else -1) if scaled else 1.0
    steps = FACTOR.sub("", cell).split("; ")
    try:
        return float(find(read(results / file), [*steps[:-1], steps[-1] + suffix])) * factor
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise DiffsegError(
            f"no number stands in `{file}; {cell}` ({error}); correct the name of the cell, or the sentence."
        ) from None


def read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return read_rows(path)


def find(found: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        if not isinstance(found, list):
            found = found[step]
        elif step.isdecimal():
            found = found[int(step)]
        elif "=" in step:
            column, value = step.split("=", 1)
            found = [row for row in found if str(row[column]) == value]
        elif len(found) == 1:
            found = found[0][step]
        else:
            raise LookupError(f"{len(found)} rows fit, not one")
    return found
