"""Put a run's numbers into results/ and into the README, so that both tell what was measured.

python -m diffseg.lab.publishing results/runs/mini-voc   # copies the run's numbers, and its notebooks as pages
python -m diffseg.lab.publishing                          # fills the README's tables only, as after a study
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import diffseg
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, read_rows
from diffseg.lab.manifests import STEPS, altered, notebook_path, read_manifest
from diffseg.lab.report import network_rows, percent
from diffseg.lab.runs import EXECUTED
from diffseg.lab.studies import study_files
from diffseg.paths import project_root


def run_table(summary: Mapping) -> str:
    """Return a run's summary.json as a Markdown table; merged classes have a column each."""
    rows = network_rows(summary)
    groups = list(rows[0]["groups"])
    lines = [
        row_of(
            ["trained on", "images", "mIoU (%)", "95 % interval over pictures", *(f"{name} (%)" for name in groups)]
        ),
        "|---" * (4 + len(groups)) + "|",
    ]
    for row in rows:
        name = row["name"].replace("true masks", "true masks (the upper line)")
        merged = [percent(row["groups"].get(group)) for group in groups]
        lines.append(
            row_of([name, row["images"], percent(row["miou"]), " to ".join(map(percent, row["interval"])), *merged])
        )
    if summary["ratio"] is not None:
        lines.append(row_of(["**ratio**", "", f"**{summary['ratio']:.2f}**", "", *[""] * len(groups)]))
    lines.append("")
    lines.append(
        f"{summary['segmenter']} from scratch, {summary['validation_images']} validation pictures, "
        f"{summary['inference']}, seed {summary['seed']}; {minutes(summary):.1f} minutes on {summary['hardware']}."
    )
    return "\n".join(lines)


def row_of(cells: Iterable[object]) -> str:
    """Return a row of a Markdown table; an empty cell is a single space."""
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def minutes(summary: Mapping) -> float:
    return sum(summary["seconds"].values()) / 60


def benchmarks_table(summaries: Sequence[Path]) -> str:
    """Return one row a published run: its benchmark, ours, the real upper line and their ratio, in Markdown.

    The number of classes is that of the IoUs in the evaluation's manifest, background included where it is one.
    """
    titles = ["run", "benchmark", "classes", "images", "synthetic, mIoU (%)", "real, mIoU (%)", "ratio", "minutes"]
    lines, older = [row_of(titles), "|---" * len(titles) + "|"], []
    for path in summaries:
        summary = json.loads(path.read_text(encoding="utf-8"))
        manifest = json.loads((path.parent / "manifests" / "05_evaluation.json").read_text(encoding="utf-8"))
        scores = [
            f"{percent(row['miou'])} ({' to '.join(map(percent, row['interval']))})" for row in network_rows(summary)
        ]
        ratio = "-" if summary["ratio"] is None else f"{summary['ratio']:.2f}"
        lines.append(
            row_of(
                [
                    path.parent.name,
                    summary["benchmark"],
                    sum(name.startswith("iou/") for name in manifest["metrics"]["synthetic"]),
                    summary["images"],
                    scores[0],
                    scores[1] if len(scores) > 1 else "-",
                    ratio,
                    f"{minutes(summary):.1f}",
                ]
            )
        )
        older += older_version(f"{path.parent.name} was measured", [manifest["versions"]])
    return "\n".join([*lines, "", "In brackets the 95 % interval over validation pictures; one seed each.", *older])


def published_table(path: Path) -> str:
    """Return results/published.csv, the numbers of others, as a Markdown table."""
    titles = ["method", "benchmark", "segmenter", "images", "mIoU (%)", "real data (%)", "source", "how sure", "note"]
    rows = read_rows(path)
    return "\n".join([row_of(titles), "|---" * len(titles) + "|", *(row_of(row.values()) for row in rows)])


def claims_table(path: Path) -> str:
    """Return results/claims.csv, the paper's claims and what became of them here, as a Markdown table."""
    lines = [row_of(["the paper's claim", "its numbers", "mini", "found", "the paper's scale"]), "|---" * 5 + "|"]
    for row in read_rows(path):
        links = {name: f" ([file]({row[name]}))" if row[name] else "" for name in ("mini_file", "paper_scale_file")}
        cells = [row["claim"], row["paper"], f"**{row['mini']}**", row["mini_finding"] + links["mini_file"]]
        lines.append(row_of([*cells, f"**{row['paper_scale']}**{links['paper_scale_file']}"]))
    return "\n".join(lines)


def trainings(training: Mapping) -> list[Mapping]:
    """Return a generator's training.json after those of the trainings that it went on from, the first one first."""
    return [*(trainings(training["initial"]) if "initial" in training else []), training]


def samples_and_seconds(training: Mapping) -> tuple[int, float]:
    """Return what the training of a generator took with those that it went on from."""
    parts = trainings(training)
    return sum(part["samples_seen"] for part in parts), sum(part["seconds"] for part in parts)


def generator_table(report: Mapping) -> str:
    """Return results/mini_generator.json as two Markdown tables: the pictures, and the masks by refiner."""
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
    lines += ["", "| mean IoU of masks (%) | generated, one object | generated, two | scenes, one | scenes, two |"]
    lines.append("|---|---|---|---|---|")
    for name, found in {"none": report, **report["refined"]}.items():
        measured = [found["mask_iou"], found["mask_iou_pairs"]]
        key = f"mask_iou_{name}".removesuffix("_none")
        measured += [report["scenes"][key], report["scenes_pairs"][key]]
        lines.append(f"| refiner `{name}` | {' | '.join(percent(value) for value in measured)} |")
    samples, seconds = samples_and_seconds(training)
    threads = report["hardware"]["threads"] or report["hardware"]["cores"]
    many = "one thread" if str(threads) == "1" else f"{threads} threads"
    lines.append("")
    lines.append(
        f"{report['pictures']} pictures of one object and {report['pairs']} of two, "
        f"{report['pictures_per_second']} a second on {many}. Drawn scenes, with their "
        f"true masks, are what a perfect generator would get; the oracle's own mIoU on mini VOC is "
        f"{percent(oracle['miou'])} %. Masks of generated pictures are judged by the oracle, those of scenes (drawn, "
        f"then noised: what does attention find there?) by the true masks. Trained on {samples:,} samples in "
        f"{seconds / 3600:.1f} hours on a machine of {training['hardware']['cores']} CPU cores."
    )
    return "\n".join(lines)


def study_table(path: Path) -> str:
    """Return results/tables/<study>.csv as a Markdown table, a score's mean and spread in one cell.

    What the network that was trained on real pictures reaches stands in rows of its own, without images and seconds.
    """
    rows = read_rows(path)
    spreads = [name for name in rows[0] if name.startswith("synthetic_") and name.endswith("_spread")]
    scores = [name.removeprefix("synthetic_").removesuffix("_spread") for name in spreads]
    titles = [f"{score.replace('miou', 'mIoU')} (%)" for score in scores]
    lines = [row_of(["configuration", "seeds", "images", *titles, "seconds"]), "|---" * (len(scores) + 4) + "|"]
    real = [row for row in rows if row.get("real_miou")]

    def cells(row: Mapping[str, str], network: str) -> list[str]:
        pairs = [(row.get(f"{network}_{score}"), row.get(f"{network}_{score}_spread")) for score in scores]
        return [
            (f"{float(mean):.1f}" if mean else "") + (f" ± {float(spread):.1f}" if spread else "")
            for mean, spread in pairs
        ]

    for row in rows:
        seconds = row["seconds"].partition(".")[0]
        lines.append(row_of([row["configuration"], row["seeds"], row["images"], *cells(row, "synthetic"), seconds]))
    for row in real:
        name = "real pictures, true masks" + (f" ({row['configuration']})" if len(real) > 1 else "")
        lines.append(row_of([name, row["seeds"], "", *cells(row, "real"), ""]))
    record = json.loads((path.parents[1] / "studies" / f"{path.stem}.json").read_text(encoding="utf-8"))
    older = older_version("Measured", record["versions"])
    return "\n".join([*lines, *([""] if older else []), *older])


def older_version(what: str, versions: Sequence[Mapping]) -> list[str]:
    """Return a sentence that says so, in a list, where a record's versions are not of this package as it is."""
    made_with = sorted({each["diffseg"] for each in versions})
    return [] if made_with == [diffseg.__version__] else [f"{what} with diffseg {' and '.join(made_with)}."]


def readme_with_tables(readme: str, results: Path) -> str:
    """Return the README with every block `<!-- table: results/FILE --> ... <!-- /table -->` made anew.

    FILE is a published run's summary.json, `*/summary.json` for all of them in one table, mini_generator.json,
    published.csv, claims.csv, or the table of a study.
    """
    from_json = {"summary.json": run_table, "mini_generator.json": generator_table}
    from_csv = {"published.csv": published_table, "claims.csv": claims_table}

    def fill(match: re.Match) -> str:
        file = results.parent / match[1]
        if "*" in match[1]:
            table = benchmarks_table(sorted(results.parent.glob(match[1])))
        elif file.suffix == ".csv":
            table = from_csv.get(file.name, study_table)(file)
        else:
            table = from_json[file.name](json.loads(file.read_text(encoding="utf-8")))
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- /table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", fill, readme, flags=re.DOTALL)


def publish(run: Path) -> None:
    """Copy a finished run's summary, table, figures and manifests to results/, and fill the README's tables.

    Its executed notebooks become pages, results/notebooks/<run>/<step>.html, for readers without Python.
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
        for name in ("summary.json", "table.txt", "figures.txt"):
            if name in manifest["outputs"]:
                files[target / name] = step / name
    for path, source in files.items():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    write_pages(run, root / "results" / "notebooks" / run.name)
    fill_readme(root)


def write_pages(run: Path, target: Path) -> None:
    """Write the executed notebooks of a finished run as HTML, one page a step, each without need of another file."""
    from diffseg.lab.pages import page  # here: nbconvert takes seconds to load, and the README's tables need none of it

    for step in STEPS:
        today = notebook_path(step)
        html = page(run / step / EXECUTED, run.name, list(STEPS), today if today.is_file() else None)
        with atomic_path(target / f"{step}.html") as temporary:
            temporary.write_text(html, encoding="utf-8")


def fill_readme(root: Path) -> None:
    readme = root / "README.md"
    with atomic_path(readme) as path:
        path.write_text(readme_with_tables(readme.read_text(encoding="utf-8"), root / "results"), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Return the exit code: 0 done, 1 one sentence on stderr says why not."""
    try:
        if len(arguments) > 1:
            raise DiffsegError("name one run: python -m diffseg.lab.publishing results/runs/mini-voc")
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
