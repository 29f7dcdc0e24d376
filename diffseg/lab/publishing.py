"""Put a run's numbers into results/ and into the pages that quote them, so that all tell what was measured."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from diffseg.errors import DiffsegError
from diffseg.files import MANIFEST, atomic_path, read_rows, write_text
from diffseg.lab.batch import step_notebooks
from diffseg.lab.manifests import read_manifest
from diffseg.lab.old_pages import can_be_remade, old_pages
from diffseg.lab.quoted import value, with_cells, with_numbers
from diffseg.lab.report import ROBUST, markdown, percent
from diffseg.lab.runs import mixture, trouble
from diffseg.lab.steps import STEPS, run_folder, steps_of
from diffseg.lab.studies import study_files
from diffseg.paths import project_root


def benchmarks_table(summaries: Sequence[Path]) -> str:
    """Return one row a published run: its benchmark, scores on synthetic and real images and their ratio, in Markdown.

    The number of classes is that of the IoUs in the evaluation's manifest, background included where it is one. Beside
    the run's score stands the mean over trainings, where the ladder has one: a single seed may be the best of them.
    """
    rows, ladder = [], summaries[0].parents[1] / "tables" / "ladder.csv" if summaries else Path()
    means = {row["benchmark"]: row for row in (read_rows(ladder) if ladder.is_file() else ())
             if (row["split"], row["rung"]) == ("validation", ROBUST)}  # fmt: skip
    for path in summaries:
        summary = json.loads(path.read_text(encoding="utf-8"))
        manifests = {each.stem: json.loads(each.read_text("utf-8")) for each in path.parent.glob("manifests/*.json")}
        manifest = manifests["05_evaluation"]
        row = {"run": path.parent.name, "benchmark": summary["benchmark"]}
        row["classes"] = sum(name.startswith("iou/") for name in manifest["metrics"]["synthetic"])
        row["images"] = summary["images"]
        for title, suffix in (("synthetic, mIoU (%)", ""), ("real, mIoU (%)", "_real")):
            interval = " to ".join(map(percent, summary[f"miou{suffix}_interval"] or []))
            row[title] = percent(summary["miou" + suffix]) + (f" ({interval})" if interval else "")
            if not suffix:
                mean = means.get(path.parent.name)
                row["mean ± spread"] = f"{mean['miou']} ± {mean['miou_spread']} ({mean['seeds']})" if mean else "-"
        row["ratio"] = "-" if summary["ratio"] is None else f"{summary['ratio']:.2f}"
        is_whole = not any(each.get("resumed") for each in manifests.values())  # else these are of the last attempt
        row["minutes"] = f"{sum(summary['seconds'].values()) / 60:.1f}" if is_whole else "-"
        rows.append(row)
    return (
        f"{markdown(rows)}\n\nOne seed, with the 95 % interval over images; mean and spread are of the synthetic score "
        "over seeds.\n"
    )


def readme_with_tables(readme: str, root: Path) -> str:
    """Return the README with every block `<!-- table: FILE --> ... <!-- /table -->` filled with that Markdown file."""

    def fill(match: re.Match) -> str:
        table = (root / match[1]).read_text(encoding="utf-8")
        return f"<!-- table: {match[1]} -->\n{table}<!-- /table -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- /table -->", fill, readme, flags=re.DOTALL)


def claim_with_numbers(claim: Mapping[str, str], results: Path) -> dict[str, str]:
    """Return a row of claims.csv with the numbers of its cells: the paper's in published.csv, ours in `mini_file`.

    Where `decided_by` names the lower end of a difference's 95 % interval, the verdict follows from it: "shown" above
    zero, else "not shown".
    """
    paper = with_cells(claim["paper"], results, "published.csv", claim["paper_cells"])
    finding = with_cells(claim["mini_finding"], results, claim["mini_file"], claim["mini_cells"])
    filled = {**claim, "paper": paper, "mini_finding": finding}
    if claim["decided_by"]:
        low = value(results, *claim["decided_by"].split("; ", 1))
        filled["mini"] = "shown" if low > 0 else "not shown"
    return filled


def publish(run: Path | None = None) -> None:
    """Copy a finished run's numbers to results/, put all tables and numbers into the pages, and make old pages again.

    The run's executed notebooks become pages for readers without Python (`write_pages`). Pages of other runs are made
    again where they are old and results/runs has the executed notebook. Raises a DiffsegError as `copy_results` does.
    """
    run = run and Path(os.path.abspath(run))  # its name is the results'
    names = copy_results(run) if run else []
    fill_readme()  # before the pages, which show these numbers
    if names:
        write_pages(run, names)
    for page in old_pages():
        if can_be_remade(page):
            write_pages(run_folder(page.parent.name), [page.stem])


def copy_results(run: Path) -> list[str]:
    """Copy a finished run's summary, table, figures and manifests to results/, and write the table of all such runs.

    Return the names of its executed notebooks. A run that holds only some outside the chain, 00 or 07, has nothing
    else. Raises a DiffsegError when a step of the run is not finished, or a notebook is missing or was executed with
    other parameters, before anything is written, and for a study, which writes its results itself.
    """
    from diffseg.lab.pages import read_executed  # here: nbconvert takes seconds to load

    results = project_root() / "results"
    if not run.is_dir():
        raise DiffsegError(f"there is no run {run}; `diffseg list` names those in results/runs.")
    if run.name in [path.stem for path in study_files()]:
        raise DiffsegError(f"{run} is a study; diffseg study {run.name} has written its results.")
    executed = sorted(path.stem for path in (run / "notebooks").glob("*.ipynb"))
    if executed and not set(executed) & set(step_notebooks()):
        return executed
    target = results / run.name
    files = {target / "figures" / figure.name: figure for figure in (run / "figures").glob("*.png")}
    if problem := mixture(run, STEPS):
        raise DiffsegError(f"{run} cannot be published: {problem}; run it: diffseg run {run.name}")
    for step in (run / name for name in STEPS):
        if problem := trouble(step):
            raise DiffsegError(f"{step} cannot be published: {problem}; run it: diffseg run {run.name}")
        files[target / "manifests" / f"{step.name}.json"] = step / MANIFEST
    for name in ("summary.json", "table.txt", "figures.txt"):
        files[target / name] = run / "06_report" / name
    for name, notebook in step_notebooks().items():
        given = read_executed(run, name).metadata.get("papermill", {}).get("parameters", {})
        for step in steps_of(notebook):
            made = read_manifest(run / step).get("recipe", {}).get("parameters", {})
            if other := [parameter for parameter in made if given.get(parameter, made[parameter]) != made[parameter]]:
                raise DiffsegError(
                    f"{run} cannot be published: its notebook {name} was executed with another {other[0]} than its "
                    f"present step; run diffseg run {run.name} --force"
                )
    for path, source in files.items():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    write_text(results / "tables" / "benchmarks.md", benchmarks_table(sorted(results.glob("*/summary.json"))))
    return list(step_notebooks())


def write_pages(run: Path, names: Sequence[str]) -> None:
    """Write results/notebooks/<run>/<name>.html of a run's executed notebooks, and the index of all pages.

    A page links to the others of its run, and to those of 00 and 07 in whichever run they were published. So publish
    these two first. Raises a DiffsegError when an executed notebook is missing, before anything is written.
    """
    from diffseg.lab.pages import index_page, page  # here: nbconvert takes seconds to load

    folder = project_root() / "results" / "notebooks"
    links = {path.stem: f"../{path.parent.name}/{path.name}" for path in sorted(folder.glob("*/0*.html"))}
    outside = {name: address for name, address in links.items() if name not in step_notebooks()}
    own = {*names, *(path.stem for path in (folder / run.name).glob("0*.html"))}
    links = dict(sorted((outside | {name: f"{name}.html" for name in own}).items()))
    for name, html in {name: page(run / "notebooks" / f"{name}.ipynb", links) for name in names}.items():
        write_text(folder / run.name / f"{name}.html", html)
    runs: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*/*.html")):
        runs.setdefault(path.parent.name, {})[path.stem] = f"{path.parent.name}/{path.name}"
    write_text(folder / "index.html", index_page(runs))


def fill_readme() -> None:
    """Put tables and quoted numbers as they are now into the pages, as after a study or a run that was published.

    Pages are README.md, those of results/ and notebooks/, the text of the notebooks, and results/claims.csv.
    """
    root = project_root()
    claims = root / "results" / "claims.csv"
    if (root / "results" / "published.csv").is_file() and not (root / "results" / "README.md").is_file():
        return  # a folder of `diffseg init`, with pages whose numbers lie in the repository
    if claims.is_file():
        rows = [claim_with_numbers(row, claims.parent) for row in read_rows(claims)]
        write_text(claims, pd.DataFrame(rows).to_csv(index=False))
    pages = [root / "README.md", root / "results" / "README.md", *root.glob("notebooks/**/README.md")]
    for path in (*pages, *sorted(root.glob("notebooks/*.ipynb"))):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            filled = with_numbers(readme_with_tables(text, root), root / "results")
            if filled != text:
                write_text(path, filled)
