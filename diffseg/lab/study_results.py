"""What a study found, from its runs' manifests alone: record, tables and figure, all under results/.

One figure more, of predictions, is made from the runs' pictures (`diffseg.lab.study_pictures`).

`record` gathers the manifests into results/studies/<study>.json; tables and figure are made from that record, so
they can be made again where the runs themselves are gone.
"""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from diffseg.files import atomic_path, sha256_file
from diffseg.lab.manifests import MANIFEST, STEPS, machine_name
from diffseg.lab.studies import Study, finished
from diffseg.paths import project_root

COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
]  # Okabe and Ito's, told apart by the colour-blind
EVALUATION = "05_evaluation"


def write_results(study: Study) -> None:
    """Write record, tables and figure of the finished runs and print the table and what is missing."""
    results = project_root() / "results"
    found = record(study)
    tables = results / "tables"
    figure = results / "figures" / f"{study.name}.png"
    main, classes = table(found), class_table(found)
    write(results / "studies" / f"{study.name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write(tables / f"{study.name}.csv", main.to_csv(index=False))
    write(tables / f"{study.name}_classes.csv", classes.to_csv(index=False))
    written = [
        tables / f"{study.name}.csv",
        tables / f"{study.name}_classes.csv",
        results / "studies" / f"{study.name}.json",
    ]
    if scores(found):
        from diffseg.figures import save_figure  # here: these load torch
        from diffseg.lab.study_pictures import predictions_figure

        save_figure(draw(found), figure)
        write(figure.with_suffix(".txt"), caption(found) + "\n")
        written.append(figure)
        made = replace(study, runs=[run for run in study.runs if run.name in found["runs"]])
        if (predictions := predictions_figure(made)) is not None:
            written.append(figure.with_stem(f"{study.name}_predictions"))
            save_figure(predictions, written[-1])
            seen = f"Validation pictures, their true masks, and what the networks of seed {study.seeds[0]} see;"
            write(written[-1].with_suffix(".txt"), caption(found, seen) + "\n")
    print(f"\n{study.question}\n\n{main.loc[:, :'seconds'].to_string(index=False, na_rep='-')}\n")
    if found["missing"]:
        print(f"not finished: {', '.join(found['missing'])}\n")
    print("\n".join(map(str, written)), flush=True)


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def record(study: Study) -> dict:
    """Return all that the tables need, and what it was made from, as JSON can hold it.

    Per run: parameters, and for each step its metrics, seconds and the sha256 of its manifest, and the run that
    made it. `versions`, `git` and `hardware` list the different ones among the manifests.
    """
    manifests = {run: finished(study, run) for run in study.runs}
    made = {run: steps for run, steps in manifests.items() if steps is not None}
    every = [manifest for steps in made.values() for manifest in steps.values()]
    return {
        "study": study.name,
        "question": study.question,
        "base": study.base,
        "only": study.only,
        "seeds": study.seeds,
        "configurations": study.configurations,
        "missing": [run.name for run in study.runs if manifests[run] is None],
        **{name: different([manifest[name] for manifest in every]) for name in ("versions", "git", "hardware")},
        "runs": {
            run.name: {
                "configuration": run.configuration,
                "seed": run.seed,
                "parameters": {name: value for m in steps.values() for name, value in m["parameters"].items()},
                "steps": {
                    step: {
                        "manifest": sha256_file(run.folder / step / MANIFEST),
                        "run": manifest["run"],
                        "seconds": manifest["seconds"],
                        "resumed": manifest["resumed"],
                        "metrics": manifest["metrics"],
                    }
                    for step, manifest in steps.items()
                },
            }
            for run, steps in made.items()
        },
    }


def different(values: Sequence) -> list:
    """Return the values without repetitions, in order."""
    return [value for k, value in enumerate(values) if value not in values[:k]]


def networks(run: Mapping) -> dict[str, Mapping]:
    """Return what a run's evaluation says of each network: "synthetic" and, where it was trained, "real"."""
    metrics = run["steps"].get(EVALUATION, {}).get("metrics", {})
    return {name: scores for name, scores in metrics.items() if isinstance(scores, dict) and "miou" in scores}


def of(found: Mapping, configuration: str) -> list[Mapping]:
    """Return the finished runs of a configuration."""
    return [run for run in found["runs"].values() if run["configuration"] == configuration]


def scores(found: Mapping) -> list[tuple[str, str]]:
    """Return (network, score) of all that was measured: mIoU, and the IoU of merged classes as "group/..."."""
    names = [
        (network, score)
        for run in found["runs"].values()
        for network, values in networks(run).items()
        for score in values
        if score == "miou" or score.startswith("group/")
    ]
    return different(names)


def values_of(runs: Sequence[Mapping], network: str, score: str) -> list[float]:
    """Return one score in % of the runs that have it."""
    found = [networks(run).get(network, {}).get(score) for run in runs]
    return [100 * value for value in found if value is not None]


def or_none(function: Callable[[list], float], values: list, least: int = 1, digits: int = 2) -> float | None:
    """Return function(values), rounded, or None for fewer than `least` values."""
    return round(function(values), digits) if len(values) >= least else None


def seconds_of(runs: Sequence[Mapping], step: str) -> float | None:
    """Return the mean seconds of a step, of shared ones too; one that was resumed knows its last attempt only."""
    return or_none(mean, [run["steps"][step]["seconds"] for run in runs if not run["steps"][step]["resumed"]], 1, 1)


def images_of(runs: Sequence[Mapping]) -> int | None:
    """Return the number of pictures that the first step to name one made: synthetic ones, before any are mixed in."""
    found = [step["metrics"]["images"] for run in runs for step in run["steps"].values() if "images" in step["metrics"]]
    return found[0] if found else None


def table(found: Mapping) -> pd.DataFrame:
    """Return one row per configuration: finished seeds, images, each score's mean and spread, mean seconds.

    Scores are in %; the spread is the sample standard deviation over the seeds, empty for one seed. The seconds
    are those of the configuration alone, as if it had shared no step.
    """
    steps = [step for step in STEPS if any(step in run["steps"] for run in found["runs"].values())]
    rows = []
    for configuration in found["configurations"]:
        runs = of(found, configuration)
        row = {"configuration": configuration, "seeds": len(runs), "images": images_of(runs)}
        for network, score in scores(found):
            values = values_of(runs, network, score)
            name = f"{network}_{score.removeprefix('group/')}"
            row |= {name: or_none(mean, values), f"{name}_spread": or_none(stdev, values, least=2)}
        seconds = {f"seconds_{step[:2]}": seconds_of(runs, step) for step in steps}
        total = None if None in seconds.values() else round(sum(seconds.values()), 1)
        rows.append(row | {"seconds": total} | seconds)
    return pd.DataFrame(rows).astype({"images": "Int64"})


def class_table(found: Mapping) -> pd.DataFrame:
    """Return one row per class: its mean IoU in % for each configuration and network, empty where undefined."""
    columns: dict[str, dict[str, float | None]] = {}
    for configuration in found["configurations"]:
        runs = of(found, configuration)
        for network in different([name for run in runs for name in networks(run)]):
            keys = [key for run in runs for key in networks(run).get(network, {}) if key.startswith("iou/")]
            name = configuration if network == "synthetic" else f"{configuration} {network}"
            columns[name] = {
                key.removeprefix("iou/"): or_none(mean, values_of(runs, network, key)) for key in different(keys)
            }
    return pd.DataFrame(columns).rename_axis("class").reset_index()


def draw(found: Mapping) -> Figure:
    """Draw each configuration's mean scores with the seeds as points; over the pictures if only these differ."""
    sizes = [changes.get("images") for changes in found["configurations"].values()]
    rest = [{k: v for k, v in changes.items() if k != "images"} for changes in found["configurations"].values()]
    if len(sizes) > 2 and None not in sizes and all(changes == rest[0] for changes in rest):
        return draw_curves(found, sizes)
    names, shown = list(found["configurations"]), scores(found)
    height = 0.8 / len(shown)
    figure, axis = plt.subplots(figsize=(4.5, 0.25 * len(names) * (len(shown) + 0.5) + 0.9))
    for k, (network, score) in enumerate(shown):
        means = [(i, values_of(of(found, name), network, score)) for i, name in enumerate(names)]
        means = [(i + (k - (len(shown) - 1) / 2) * height, values) for i, values in means if values]
        places, lengths = [place for place, _ in means], [mean(values) for _, values in means]
        axis.barh(places, lengths, 0.9 * height, color=COLOURS[k % len(COLOURS)], label=label_of(network, score))
        for place, values in means:
            axis.plot(values, [place] * len(values), "o", color="black", markersize=3, markerfacecolor="white")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="IoU (%)" if len({score for _, score in shown}) > 1 else "mIoU (%)", xlim=(0, None))
    finish(axis, len(shown))
    return figure


def draw_curves(found: Mapping, sizes: Sequence[int]) -> Figure:
    """Draw the scores over the number of synthetic pictures, on a log axis."""
    figure, axis = plt.subplots(figsize=(4.5, 3))
    for k, (network, score) in enumerate(scores(found)):
        points = zip(
            sizes, (values_of(of(found, name), network, score) for name in found["configurations"]), strict=True
        )
        points = sorted((size, values) for size, values in points if values)
        colour = COLOURS[k % len(COLOURS)]
        means = [mean(values) for _, values in points]
        axis.plot([size for size, _ in points], means, color=colour, label=label_of(network, score))
        for size, values in points:
            axis.plot([size] * len(values), values, "o", color="black", markersize=3, markerfacecolor="white")
    axis.set(xscale="log", xlabel="synthetic pictures", ylabel="mIoU (%)", ylim=(0, None))
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    finish(axis, len(scores(found)))
    return figure


def label_of(network: str, score: str) -> str:
    return f"{network}, {'mIoU' if score == 'miou' else score.removeprefix('group/')}"


def finish(axis: plt.Axes, count: int) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    if count > 1:
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(count, 3), fontsize=8)
    axis.figure.tight_layout()


def caption(found: Mapping, shown: str = "") -> str:
    """Return a figure's caption: question, what is shown (else means over seeds), hardware, and what is missing."""
    runs = list(found["runs"].values())
    measured = [scores for run in runs for scores in networks(run).values()]
    benchmark, images = measured[0].get("benchmark", found["base"]), measured[0].get("images")
    numbers = [images_of(of(found, name)) for name in found["configurations"]]
    drawn = different([f"{number}" for number in numbers if number is not None])
    machines = [machine_name(machine) for machine in found["hardware"]]
    seeds = ", ".join(map(str, found["seeds"]))
    sentences = [
        f"{found['question'].rstrip('.?')}{'?' if found['question'].endswith('?') else '.'}",
        shown or f"Means on {images} {benchmark} pictures, one point a seed (seeds {seeds});",
        f"trained on {', '.join(drawn)} synthetic pictures; measured on {' and on '.join(different(machines))}.",
    ]
    if found["missing"]:
        sentences.append(f"Not finished: {', '.join(found['missing'])}.")
    return textwrap.fill(" ".join(sentences), 100)
