"""Put a run's numbers into results/ and into the README, so that both tell what was measured.

python -m diffseg.lab.publishing results/runs/mini-voc   # copies the run's numbers, and its notebooks as pages
python -m diffseg.lab.publishing                          # fills the README's tables only, as after a study
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffseg
from diffseg.errors import DiffsegError
from diffseg.files import MANIFEST, atomic_path, read_rows
from diffseg.lab.batch import step_notebooks
from diffseg.lab.report import markdown, percent
from diffseg.lab.runs import trouble
from diffseg.lab.steps import STEPS
from diffseg.lab.studies import study_files
from diffseg.paths import project_root


def benchmarks_table(summaries: Sequence[Path]) -> str:
    """Return one row a published run: its benchmark, scores on synthetic and real images and their ratio, in Markdown.

    The number of classes is that of the IoUs in the evaluation's manifest, background included where it is one.
    """
    rows, older = [], []
    for path in summaries:
        summary = json.loads(path.read_text(encoding="utf-8"))
        manifest = json.loads((path.parent / "manifests" / "05_evaluation.json").read_text(encoding="utf-8"))
        row = {"run": path.parent.name, "benchmark": summary["benchmark"]}
        row["classes"] = sum(name.startswith("iou/") for name in manifest["metrics"]["synthetic"])
        row["images"] = summary["images"]
        for title, suffix in (("synthetic, mIoU (%)", ""), ("real, mIoU (%)", "_real")):
            interval = " to ".join(map(percent, summary[f"miou{suffix}_interval"] or []))
            row[title] = percent(summary["miou" + suffix]) + (f" ({interval})" if interval else "")
        row["ratio"] = "-" if summary["ratio"] is None else f"{summary['ratio']:.2f}"
        row["minutes"] = f"{sum(summary['seconds'].values()) / 60:.1f}"
        rows.append(row)
        older += older_version(f"{path.parent.name} was measured", [manifest["versions"]])
    note = "In brackets the 95 % interval over validation images; one seed each."
    return "\n".join([markdown(rows), "", note, *older])


def trainings(training: Mapping) -> list[Mapping]:
    """Return a generator's training.json after those of the trainings that it went on from, the first one first."""
    return [*(trainings(training["initial"]) if "initial" in training else []), training]


def generator_table(path: Path) -> str:
    """Return results/mini_generator.json as two Markdown tables: the images, and the masks by refiner."""
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, key in (
        ("the prompted class is the largest object (%)", "class_present"),
        ("the image is the word's own, not another of its class (%)", "own_picture"),
        ("the background is the prompted one (%)", "background"),
        ("IoU of the unrefined attention mask with the oracle's mask of that class (%)", "mask_iou"),
        ("IoU of the unrefined attention mask with the oracle's mask of any class (%)", "mask_iou_object"),
        ("of two prompted objects both are there (%)", "both_present"),
    ):
        row = {"measure": name, "all words": percent(report[key])}
        row["class words"] = percent(report.get(f"{key}_plain_words"))
        rows.append(row | {"scenes": percent(report["real"][key])})
    masks = []
    for refiner, found in {"none": report, **report["refined"]}.items():
        key = f"mask_iou_{refiner}".removesuffix("_none")
        scores = [found["mask_iou"], found["mask_iou_pairs"], report["scenes"][key], report["scenes_pairs"][key]]
        titles = ("generated, one object", "generated, two", "noised scenes, one", "noised scenes, two")
        masks.append(
            {"mean IoU of masks (%)": f"refiner `{refiner}`"} | dict(zip(titles, map(percent, scores), strict=True))
        )
    parts, threads = trainings(report["training"]), report["hardware"]["threads"] or report["hardware"]["cores"]
    note = (
        f"{report['pictures']} images of one object and {report['pairs']} of two, {report['pictures_per_second']} a "
        f"second (threads: {threads}). The oracle's mIoU on mini VOC: {percent(report['oracle']['miou'])} %. Training: "
        f"{sum(part['samples_seen'] for part in parts):,} samples, {sum(part['seconds'] for part in parts) / 3600:.1f} "
        f"hours (CPU cores: {report['training']['hardware']['cores']})."
    )
    return "\n\n".join([markdown(rows), markdown(masks), note])


def study_table(path: Path) -> str:
    """Return results/tables/<study>.csv as a Markdown table, a score's mean and spread in one cell.

    The scores of networks trained on real images stand in rows of their own, without images and seconds.
    """
    table = read_rows(path)
    scores = [name[len("synthetic_") : -len("_spread")] for name in table[0] if re.match("synthetic_.*_spread$", name)]
    real = [row for row in table if row.get("real_miou")]

    def cells(row: Mapping[str, str], network: str) -> dict[str, str]:
        pairs = {score: (row.get(f"{network}_{score}"), row.get(f"{network}_{score}_spread")) for score in scores}
        return {
            f"{score.replace('miou', 'mIoU')} (%)": (f"{float(mean):.1f}" if mean else "")
            + (f" ± {float(spread):.1f}" if spread else "")
            for score, (mean, spread) in pairs.items()
        }

    rows = []
    for row in table:
        named = {name: row[name] for name in ("configuration", "seeds", "images")}
        rows.append(named | cells(row, "synthetic") | {"seconds": row["seconds"].partition(".")[0]})
    for row in real:
        name = "real images, ground-truth masks" + (f" ({row['configuration']})" if len(real) > 1 else "")
        rows.append({"configuration": name, "seeds": row["seeds"], **cells(row, "real")})
    record = json.loads((path.parents[1] / "studies" / f"{path.stem}.json").read_text(encoding="utf-8"))
    return "\n\n".join([markdown(rows), *older_version("Measured", record["versions"])])


def older_version(what: str, versions: Sequence[Mapping]) -> list[str]:
    """Return a sentence that says so, in a list, where a record's versions are not of this package as it is."""
    made_with = sorted({each["diffseg"] for each in versions})
    return [] if made_with == [diffseg.__version__] else [f"{what} with diffseg {' and '.join(made_with)}."]


def readme_with_tables(readme: str, results: Path) -> str:
    """Return the README with every block `<!-- table: results/FILE --> ... <!-- /table -->` made anew.

    FILE is `*/summary.json` for all published runs in one table, mini_generator.json, or the table of a study.
    """

    def fill(match: re.Match) -> str:
        name, file = match[1], results.parent / match[1]
        if name.endswith("*/summary.json"):
            table = benchmarks_table(sorted(results.parent.glob(name)))
        else:
            table = study_table(file) if file.suffix == ".csv" else generator_table(file)
        return f"<!-- table: {name} -->\n{table}\n<!-- /table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", fill, readme, flags=re.DOTALL)


def publish(run: Path) -> None:
    """Copy a finished run's summary, table, figures and manifests to results/, and fill the README's tables.

    Its executed notebooks become pages, results/notebooks/<run>/<step>.html, for readers without Python. Raises a
    DiffsegError when a step of the run is not finished, and for a study, which writes its results itself.
    """
    from diffseg.lab.pages import page  # here: nbconvert takes seconds to load, and the README's tables need none of it

    results = project_root() / "results"
    if not run.is_dir():
        raise DiffsegError(f"there is no run {run}; `diffseg list` names those in results/runs.")
    if run.name in [path.stem for path in study_files()]:
        raise DiffsegError(f"{run} is a study; diffseg study {run.name} has written its results.")
    target = results / run.name
    files = {target / "figures" / figure.name: figure for figure in (run / "figures").glob("*.png")}
    for step in (run / name for name in STEPS):
        if problem := trouble(step):
            raise DiffsegError(f"{step} cannot be published: {problem}; run it: diffseg run {run.name}")
        files[target / "manifests" / f"{step.name}.json"] = step / MANIFEST
    for name in ("summary.json", "table.txt", "figures.txt"):
        files[target / name] = run / "06_report" / name
    pages = {name: page(run / "notebooks" / f"{name}.ipynb", list(step_notebooks())) for name in step_notebooks()}
    for path, source in files.items():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    for name, html in pages.items():
        write_text(results / "notebooks" / run.name / f"{name}.html", html)
    fill_readme()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fill_readme() -> None:
    readme = project_root() / "README.md"
    write_text(readme, readme_with_tables(readme.read_text(encoding="utf-8"), project_root() / "results"))


def main(arguments: list[str]) -> int:
    """Return the exit code: 0 done, 1 one sentence on stderr says why not."""
    try:
        if len(arguments) > 1:
            raise DiffsegError("name one run: python -m diffseg.lab.publishing results/runs/mini-voc")
        if arguments:
            publish(Path(arguments[0]))
        else:
            fill_readme()
    except DiffsegError as error:
        print(f"diffseg: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
