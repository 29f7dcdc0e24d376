"""What a study found, from its runs' manifests: record, tables and figures, all under results/.

`study_record` gathers the manifests into results/studies/<study>.json. The tables and the figure of scores are made
from that record, so they can be made again where the runs themselves are gone. The figure of predictions is made from
what step 5 of the runs holds.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from diffseg.benchmarks.classes import get_benchmark
from diffseg.files import MANIFEST, sha256_file, write_text
from diffseg.lab.batch import step_parameters
from diffseg.lab.manifests import read_manifest
from diffseg.lab.provenance import machine_name
from diffseg.lab.report import REAL, markdown
from diffseg.lab.steps import notebook_of
from diffseg.lab.studies import Study, finished_steps
from diffseg.paths import project_root


def write_results(study: Study) -> None:
    """Write record, tables and figures of the finished runs and print the table and what is missing."""
    results, name = project_root() / "results", study.name
    record = study_record(study)
    table, scores = study_table(record), score_rows(record)
    texts = {
        results / "tables" / f"{name}.csv": table.to_csv(index=False),
        results / "tables" / f"{name}_classes.csv": class_table(record).to_csv(index=False),
        results / "studies" / f"{name}.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    if len(scores):
        from diffseg.charts import study_scores  # here: they load torch
        from diffseg.figures import save_figure, study_predictions

        texts[results / "tables" / f"{name}.md"] = readable_table(record)
        figures = {name: study_scores(scores, study.configurations)}
        if folders := prediction_folders(study):
            values = step_parameters(notebook_of("05_evaluation"), study.runs[0].values)
            benchmark = get_benchmark(values["benchmark"], values["class_list"], values["data_names"])
            split = values["evaluation_split"] or benchmark.evaluation_split
            figures[f"{name}_predictions"] = study_predictions(folders, benchmark, values["data_root"], split)
        for stem, figure in figures.items():
            save_figure(figure, results / "figures" / f"{stem}.png")
            texts[results / "figures" / f"{stem}.txt"] = captions(record)[stem]
    for path, text in texts.items():
        write_text(path, text)
    print(f"\n{study.question}\n\n{table.loc[:, :'seconds'].to_string(index=False, na_rep='-')}\n")
    if record["missing"]:
        print(f"not finished: {', '.join(record['missing'])}\n")
    print("\n".join(map(str, texts)), flush=True)


def prediction_folders(study: Study) -> dict[str, Path]:
    """Return configuration -> the predictions of its first seed, of those configurations that have any."""
    found = {}
    for run in study.runs:
        if run.seed == study.seeds[0] and (folders := finished_steps(study, run)) and "05_evaluation" in folders:
            found[run.configuration] = folders["05_evaluation"] / "predictions" / "synthetic"
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def study_record(study: Study) -> dict:
    """Return all that the tables need, and what it was made from, as JSON can hold it.

    Per run: parameters, and for each step its metrics, seconds and the sha256 of its manifest, and the run that
    made it. `versions`, `git` and `hardware` list the different ones among the manifests.
    """
    runs, missing, every = {}, [], []
    for run in study.runs:
        folders = finished_steps(study, run)
        if folders is None:
            missing.append(run.name)
            continue
        manifests = {step: read_manifest(folder) for step, folder in folders.items()}
        every += manifests.values()
        runs[run.name] = {
            "configuration": run.configuration,
            "seed": run.seed,
            "parameters": {name: value for made in manifests.values() for name, value in made["parameters"].items()},
            "steps": {
                step: {"manifest": sha256_file(folders[step] / MANIFEST)}
                | {name: manifest[name] for name in ("run", "seconds", "resumed", "metrics")}
                for step, manifest in manifests.items()
            },
        }
    return {
        "study": study.name,
        **{name: getattr(study, name) for name in ("question", "base", "only", "seeds", "configurations")},
        "missing": missing,
        **{name: unique(manifest[name] for manifest in every) for name in ("versions", "git", "hardware")},
        "runs": runs,
    }


def unique(values: Iterable) -> list:
    """Return the values, which may be dictionaries, without repetitions, in order."""
    return list({repr(value): value for value in values}.values())


def evaluations(run: Mapping) -> dict[str, Mapping]:
    """Return what a run's evaluation says of each network: "synthetic" and, where it was trained, "real"."""
    metrics = run["steps"].get("05_evaluation", {}).get("metrics", {})
    return {name: scores for name, scores in metrics.items() if isinstance(scores, dict) and "miou" in scores}


def score_rows(record: Mapping, classes: bool = False) -> pd.DataFrame:
    """Return a row for each configuration, seed, network and score; values in %, nan where undefined.

    Scores are "miou" and the IoU of merged classes by their names, or with `classes` the IoU of each class.
    """
    prefix = "iou/" if classes else "group/"
    rows = [
        (run["configuration"], run["seed"], network, score.removeprefix(prefix), value)
        for run in record["runs"].values()
        for network, scores in evaluations(run).items()
        for score, value in scores.items()
        if score.startswith(prefix) or (score == "miou" and not classes)
    ]
    table = pd.DataFrame(rows, columns=["configuration", "seed", "network", "score", "value"])
    return table.assign(value=100 * table.value.astype(float))


def images_by_configuration(record: Mapping) -> dict[str, int]:
    """Return configuration -> the `images` that a step counts first: synthetic ones, before real ones are mixed in."""
    found: dict[str, int] = {}
    for run in record["runs"].values():
        for step in run["steps"].values():
            if "images" in step["metrics"]:
                found.setdefault(run["configuration"], step["metrics"]["images"])
    return found


def study_table(record: Mapping) -> pd.DataFrame:
    """Return one row per configuration: finished seeds, images, each score's mean and spread, gain, mean seconds.

    Scores are in %; the spread is the sample standard deviation over the seeds, empty for one seed. `gain` is what the
    synthetic network's mIoU gains over the configuration before: the mean difference of equal seeds with its 95 %
    interval of Student's t. The seconds are those of the configuration alone, as if it had shared no step; of a resumed
    step only the last attempt is known, so it does not count.
    """
    from diffseg.charts import mean_interval  # here: it loads torch

    runs = record["runs"].values()
    table = pd.DataFrame({"configuration": list(record["configurations"])}).set_index("configuration", drop=False)
    table["seeds"] = [sum(run["configuration"] == name for run in runs) for name in table.index]
    table["images"] = pd.Series(images_by_configuration(record), dtype="Int64")
    scores = score_rows(record)
    for (network, score), rows in scores.groupby(["network", "score"], sort=False):
        values = rows.groupby("configuration").value
        table[f"{network}_{score}"] = values.mean().round(2)
        table[f"{network}_{score}_spread"] = values.std().round(2)
    synthetic = scores[(scores.network == "synthetic") & (scores.score == "miou")]
    seeds = synthetic.pivot(index="seed", columns="configuration", values="value").reindex(columns=table.index)
    gained = {name: gain.dropna() for name, gain in seeds.diff(axis=1).items()}
    gains = {name: mean_interval(gain) for name, gain in gained.items() if len(gain)}
    table = table.join(pd.DataFrame.from_dict(gains, "index", columns=["gain", "gain_low", "gain_high"]).round(2))
    seconds = pd.DataFrame(
        [
            (run["configuration"], run["seed"], f"seconds_{name[:2]}", None if step["resumed"] else step["seconds"])
            for run in runs
            for name, step in run["steps"].items()
        ],
        columns=["configuration", "seed", "notebook", "seconds"],
    )
    seconds = seconds.groupby(["configuration", "seed", "notebook"]).seconds.agg(lambda steps: steps.sum(skipna=False))
    seconds = seconds.groupby(["configuration", "notebook"]).mean().round(1).unstack()
    table["seconds"] = seconds.sum(axis=1, skipna=False).round(1)
    return table.join(seconds)


def class_table(record: Mapping) -> pd.DataFrame:
    """Return one row per class: its mean IoU in % for each configuration and network, empty where undefined."""
    rows = score_rows(record, classes=True)
    name = rows.configuration + (" " + rows.network).where(rows.network != "synthetic", "")
    means = rows.assign(name=name).groupby(["score", "name"], sort=False).value.mean().round(2).unstack()
    return means.loc[unique(rows.score), unique(name)].rename_axis("class").reset_index()


def readable_table(record: Mapping) -> str:
    """Return the study's table in Markdown: a score's mean and spread in one cell, whole seconds, who measured.

    The scores of networks trained on real images stand in rows of their own, without images and seconds.
    """
    scores = score_rows(record).dropna().groupby(["network", "configuration", "score"], sort=False).value
    scores = scores.agg(["mean", "std"]).round(2)  # as in the CSV
    cells = (scores["mean"].map("{:.1f}".format) + scores["std"].map(" ± {:.1f}".format, "ignore").fillna("")).unstack()
    cells = cells[unique(score_rows(record).score)].rename(columns=lambda name: f"{name.replace('miou', 'mIoU')} (%)")
    table = study_table(record)
    rows = table[["configuration", "seeds", "images"]].join(cells.loc["synthetic"])
    rows["seconds"] = table.seconds.round().astype("Int64")
    if "real" in cells.index:
        real = table[["configuration", "seeds"]].join(cells.loc["real"], how="inner")
        names = " (" + real.configuration + ")" if len(real) > 1 else ""
        rows = pd.concat([rows, real.assign(configuration=REAL + names)])
    versions = " and ".join(sorted({each["diffseg"] for each in record["versions"]}))
    return f"{markdown(rows)}\n\nMeasured with diffseg {versions}.\n"


def captions(record: Mapping) -> dict[str, str]:
    """Return the captions of a study's figures: name of the file -> text."""
    seeds = ", ".join(map(str, record["seeds"]))
    shown = f"Means and 95 % intervals over seeds {seeds}, one tick a seed"
    predictions = f"Validation images, ground truth, predictions (seed {record['seeds'][0]})"
    return {record["study"]: caption(record, shown), f"{record['study']}_predictions": caption(record, predictions)}


def caption(record: Mapping, shown: str) -> str:
    """Return a figure's caption: question, what is shown, images, hardware, and what is missing."""
    scores = next(scores for run in record["runs"].values() for scores in evaluations(run).values())
    trained = ", ".join(map(str, unique(images_by_configuration(record).values())))
    question = record["question"]
    sentences = [
        question if question.endswith("?") else f"{question.rstrip('.')}.",
        f"{shown}; {scores.get('images')} {scores.get('benchmark', record['base'])} images;",
        f"trained on {trained} synthetic images; {' and '.join(unique(map(machine_name, record['hardware'])))}.",
    ]
    if record["missing"]:
        sentences.append(f"Not finished: {', '.join(record['missing'])}.")
    return textwrap.fill(" ".join(sentences), 100) + "\n"
