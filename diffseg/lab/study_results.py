"""What a study found, from its runs' manifests alone: record, tables and figure, all under results/.

One figure more, of predictions, is made from the runs' images (`diffseg.lab.study_pictures`).

`study_record` gathers the manifests into results/studies/<study>.json; tables and figure are made from that record, so
they can be made again where the runs themselves are gone.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from diffseg.files import MANIFEST, atomic_path, sha256_file
from diffseg.lab.manifests import read_manifest
from diffseg.lab.provenance import machine_name
from diffseg.lab.studies import Study, finished_steps
from diffseg.paths import project_root

# Okabe and Ito's, told apart by the colour-blind
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]


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
        from diffseg.figures import save_figure  # here: these load torch
        from diffseg.lab.study_pictures import predictions_figure

        seeds = f"seeds {', '.join(map(str, study.seeds))}"
        predicted = f"Validation images, ground truth, predictions (seed {study.seeds[0]})"
        for figure, stem, shown in (
            (study_figure(record), name, f"Means over {seeds}, one point a seed"),
            (predictions_figure(study), f"{name}_predictions", predicted),
        ):
            if figure is not None:
                save_figure(figure, results / "figures" / f"{stem}.png")
                texts[results / "figures" / f"{stem}.txt"] = caption(record, shown) + "\n"
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"\n{study.question}\n\n{table.loc[:, :'seconds'].to_string(index=False, na_rep='-')}\n")
    if record["missing"]:
        print(f"not finished: {', '.join(record['missing'])}\n")
    print("\n".join(map(str, texts)), flush=True)


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
    """Return the values without repetitions, in order."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


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
    """Return one row per configuration: finished seeds, images, each score's mean and spread, mean seconds.

    Scores are in %; the spread is the sample standard deviation over the seeds, empty for one seed. The seconds are
    those of the configuration alone, as if it had shared no step; of a resumed step only the last attempt is known, so
    it does not count.
    """
    runs = record["runs"].values()
    table = pd.DataFrame({"configuration": list(record["configurations"])}).set_index("configuration", drop=False)
    table["seeds"] = [sum(run["configuration"] == name for run in runs) for name in table.index]
    table["images"] = pd.Series(images_by_configuration(record), dtype="Int64")
    scores = score_rows(record)
    for (network, score), rows in scores.groupby(["network", "score"], sort=False):
        values = rows.groupby("configuration").value
        table[f"{network}_{score}"] = values.mean().round(2)
        table[f"{network}_{score}_spread"] = values.std().round(2)
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


def study_figure(record: Mapping) -> Figure:
    """Draw each configuration's mean scores with the seeds as points; over the images if only these differ."""
    changes = record["configurations"]
    sizes = {name: changed.get("images") for name, changed in changes.items()}
    others = [{k: v for k, v in changed.items() if k != "images"} for changed in changes.values()]
    is_curve = len(sizes) > 2 and None not in sizes.values() and all(other == others[0] for other in others)
    shown = list(score_rows(record).groupby(["network", "score"], sort=False))
    height = 0.8 / len(shown)
    bars = 4.5, 0.25 * len(changes) * (len(shown) + 0.5) + 0.9
    figure, axis = plt.subplots(figsize=(4.5, 3) if is_curve else bars)
    points = {"linestyle": "", "marker": "o", "color": "black", "markersize": 3, "markerfacecolor": "white"}
    for k, ((network, score), rows) in enumerate(shown):
        look = {"color": COLOURS[k % len(COLOURS)], "label": f"{network}, {'mIoU' if score == 'miou' else score}"}
        if is_curve:
            place = rows.configuration.map(sizes)
            means = rows.value.groupby(place).mean()
            axis.plot(means.index, means, **look)
            axis.plot(place, rows.value, **points)
        else:
            place = rows.configuration.map(list(changes).index) + (k - (len(shown) - 1) / 2) * height
            means = rows.value.groupby(place).mean()
            axis.barh(means.index, means, 0.9 * height, **look)
            axis.plot(rows.value, place, **points)
    if is_curve:
        axis.set(xscale="log", xlabel="synthetic images", ylabel="mIoU (%)", ylim=(0, None))
        axis.set_xticks(list(sizes.values()), list(map(str, sizes.values())))
        axis.minorticks_off()
    else:
        axis.set_yticks(range(len(changes)), list(changes))
        axis.invert_yaxis()
        axis.set(xlabel="mIoU (%)" if all(score == "miou" for (_, score), _ in shown) else "IoU (%)", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    if len(shown) > 1:
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(shown), 3), fontsize=8)
    figure.tight_layout()
    return figure


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
    return textwrap.fill(" ".join(sentences), 100)
