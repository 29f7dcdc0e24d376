"""Numbers in prose that come from a file of results/: `84.1<!-- mini-voc/summary.json; miou_real * 100 -->`.

The comment directly behind a number names its cell; no reader sees it. `diffseg publish` writes the numbers again, and
a test compares. After the file, below results/, it says where the number stands, divided by `; `: in JSON a key or
position each, in a CSV file and in a JSON list of objects `column=value` until one row is left, then its column. At the
end there may be a factor, ` * 100` for a share in % or ` / 3600`. A number keeps its decimals and its commas.
"""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffseg.errors import DiffsegError

QUOTED = re.compile(r"(?P<number>\d[\d,]*(?:\.\d+)?)<!-- (?P<file>[^ ;]+\.(?:csv|json)); (?P<cell>.+?) -->")


def with_numbers(text: str, results: Path) -> str:
    """Return a page's text with every quoted number as it stands in its file below `results` today.

    Raises a DiffsegError that names the comment whose cell is not there, or is no number.
    """

    def fill(match: re.Match) -> str:
        steps, factor = match["cell"], 1.0
        if scaled := re.fullmatch(r"(.+) ([*/]) ([\d.]+(?:e\d+)?)", match["cell"]):
            steps, factor = scaled[1], float(scaled[3]) ** (1 if scaled[2] == "*" else -1)
        try:
            value = float(find(read(results / match["file"]), steps.split("; "))) * factor
        except (OSError, LookupError, TypeError, ValueError) as error:
            quoted = match[0][len(match["number"]) :]
            raise DiffsegError(
                f"{quoted} quotes no number that stands there ({error}); correct the comment, or the sentence."
            ) from None
        comma = "," if "," in match["number"] else ""
        number = f"{value:{comma}.{len(match['number'].partition('.')[2])}f}"
        return number + match[0][len(match["number"]) :]

    return QUOTED.sub(fill, text)


def read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
