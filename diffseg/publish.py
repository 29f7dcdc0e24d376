"""Put a run's numbers into results/ and into the README, so that both tell what was measured.

python -m diffseg.publish results/runs/mini-voc   # copies the run's numbers
python -m diffseg.publish                          # fills the README's tables only, as after a study
"""

import csv
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.manifest import STEPS, altered, project_root, read_manifest
from diffseg.study import study_files


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def run_table(summary: Mapping) -> str:
    """Return a run's summary.json as a Markdown table."""
    rows = [("synthetic pictures, masks from attention", "images", "miou", "miou_interval")]
    rows.append(("real pictures, true masks (the upper line)", "images_real", "miou_real", "miou_real_interval"))
    lines = ["| trained on | images | mIoU (%) | 95 % interval over pictures |", "|---|---|---|---|"]
    for name, images, miou, interval in rows:
        if summary[miou] is None:  # a run without the real network
            continue
        low, high = map(percent, summary[interval])
        lines.append(f"| {name} | {summary[images]} | {percent(summary[miou])} | {low} to {high} |")
    if summary["ratio"] is not None:
        lines.append(f"| **ratio** | | **{summary['ratio']:.2f}** | |")
    minutes = sum(summary["seconds"].values()) / 60
    lines.append("")
    lines.append(
        f"{summary['segmenter']} from scratch, {summary['validation_images']} validation pictures, "
        f"{summary['inference']}, seed {summary['seed']}; {minutes:.1f} minutes on {summary['hardware']}."
    )
    return "\n".join(lines)


def generator_table(report: Mapping) -> str:
    """Return results/mini_generator.json as a Markdown table."""
    training, oracle, real = report["training"], report["oracle"], report["real"]
    lines = ["| measure | all words | plain class words | drawn scenes |", "|---|---|---|---|"]
    for name, key in (
        ("the prompted class is the largest object (%)", "class_present"),
        ("the picture is the word's own, not another of its class (%)", "own_picture"),
        ("the background is the prompted one (%)", "background"),
        ("IoU of the attention mask with the oracle's mask of that class, before any refiner (%)", "mask_iou"),
        ("the same with the oracle's mask of the object, whatever it takes it for (%)", "mask_iou_object"),
    ):
        cells = [percent(report[key]), percent(report[f"{key}_plain_words"]), percent(real[key])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"| of two prompted objects both are there (%) | {percent(report['both_present'])} | "
        f"| {percent(real['both_present'])} |"
    )
    hours = training["seconds"] / 3600
    threads = report["measured_on"]["threads"] or report["measured_on"]["cores"]
    lines.append("")
    lines.append(
        f"{report['pictures']} pictures of one object and {report['pairs']} of two, "
        f"{report['pictures_per_second']} a second on {threads} thread(s). Drawn scenes, with their "
        f"true masks, are what a perfect generator would get; the oracle's own mIoU on mini VOC is "
        f"{percent(oracle['miou'])} %. Trained on {training['samples_seen']:,} samples in {hours:.1f} hours on "
        f"{training['hardware']['cores']} CPU cores."
    )
    return "\n".join(lines)


def study_table(path: Path) -> str:
    """Return results/tables/<study>.csv as a Markdown table, a score's mean and spread in one cell."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [name.removesuffix("_spread") for name in rows[0] if name.endswith("_spread")]
    titles = [f"{score.replace('_', ', ').replace('miou', 'mIoU')} (%)" for score in scores]
    lines = [f"| configuration | seeds | images | {' | '.join(titles)} | seconds |", "|---" * (len(scores) + 4) + "|"]
    for row in rows:
        cells = [row["configuration"], row["seeds"], row["images"]]
        for score in scores:
            spread = f" ± {float(row[f'{score}_spread']):.1f}" if row[f"{score}_spread"] else ""
            cells.append(f"{float(row[score]):.1f}{spread}" if row[score] else "")
        lines.append(f"| {' | '.join([*cells, row['seconds'].partition('.')[0]])} |")
    return "\n".join(lines)


def readme_with_tables(readme: str, results: Path) -> str:
    """Return the README with every block `<!-- table: results/FILE --> ... <!-- /table -->` made anew."""
    makers = {"summary.json": run_table, "mini_generator.json": generator_table}

    def fill(match: re.Match) -> str:
        file = results.parent / match[1]
        if file.suffix == ".csv":
            table = study_table(file)
        else:
            table = makers[file.name](json.loads(file.read_text(encoding="utf-8")))
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- /table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", fill, readme, flags=re.DOTALL)


def publish(run: Path) -> None:
    """Copy a finished run's summary, table, figures and manifests to results/, and fill the README's tables.

    Raises a DiffsegError when a step of the run is not finished, and for a study, which writes its own results.
    """
    root = project_root()
    if not run.is_dir():
        raise DiffsegError(f"there is no run {run}; `diffseg list` names those in results/runs.")
    if run.name in [path.stem for path in study_files()]:
        raise DiffsegError(f"{run} is a study; diffseg study {run.name} has written its results.")
    target = root / "results" / run.name
    files = {}
    for step in (run / name for name in STEPS):
        manifest = read_manifest(step)
        if manifest is None or altered(step, manifest):
            raise DiffsegError(f"{step} is not finished or was altered; run it again: diffseg run {run.name}")
        files[target / "manifests" / f"{step.name}.json"] = step / "manifest.json"
        for figure in manifest["metrics"].get("figures", []):
            files[target / "figures" / figure] = step / figure
        for name in ("summary.json", "table.txt"):
            if name in manifest["outputs"]:
                files[target / name] = step / name
    for path, source in files.items():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    fill_readme(root)


def fill_readme(root: Path) -> None:
    readme = root / "README.md"
    with atomic_path(readme) as path:
        path.write_text(readme_with_tables(readme.read_text(encoding="utf-8"), root / "results"), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Return the exit code: 0 done, 1 one sentence on stderr says why not."""
    try:
        if len(arguments) > 1:
            raise DiffsegError("name one run: python -m diffseg.publish results/runs/mini-voc")
        if arguments:
            publish(Path(arguments[0]))
        else:
            fill_readme(project_root())
    except DiffsegError as error:
        print(f"diffseg: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
