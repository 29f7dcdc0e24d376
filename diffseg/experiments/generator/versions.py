"""What did further training bring? One generator's numbers beside those of the one before it, class by class.

    python -m diffseg.experiments.generator.versions results/mini_generator_0.1.0.json results/mini_generator_0.2.0.json

Reads two reports of `measure` and writes results/tables/generator_versions.csv.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from diffseg.errors import DiffsegError
from diffseg.files import write_rows
from diffseg.paths import project_root

ASKED_ALIKE = ("pictures", "pairs", "sampling", "thresholds", "oracle")  # what two reports must have in common
OF_A_CLASS = {"class_present": "present", "own_picture": "own_picture", "mask_iou": "iou"}
OF_ALL = [*OF_A_CLASS, *(f"{name}_hyponyms" for name in OF_A_CLASS), "both_present", "mask_iou_pairs", "background"]


def version_rows(before: Mapping, after: Mapping) -> list[dict]:
    """Return one row a measure of all pictures, then one a class and measure; shares and IoUs in 0..1.

    Raises a DiffsegError when the reports do not ask for the same pictures in the same way.
    """
    for name in ASKED_ALIKE:
        if before[name] != after[name]:
            raise DiffsegError(f"the two reports differ in {name}: {before[name]} and {after[name]}; measure one again")

    def row(of: str, name: str, values: tuple[float, float]) -> dict:
        was, now = (round(value, 4) for value in values)
        return {"of": of, "measure": name, "before": was, "after": now, "gain": round(now - was, 4)}

    rows = [row("all", name, (before[name], after[name])) for name in OF_ALL]
    for of in before["per_class"]:
        was, now = before["per_class"][of], after["per_class"][of]
        rows += [row(of, name, (was[key], now[key])) for name, key in OF_A_CLASS.items()]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a report of measure")
    parser.add_argument("after", type=Path, help="a report of measure, of the same pictures")
    parser.add_argument("--results", type=Path, default=project_root() / "results", help="where to write")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after)]
    path = options.results / "tables" / "generator_versions.csv"
    write_rows(path, version_rows(*reports))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
