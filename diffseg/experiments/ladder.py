"""Where are the points lost between real and synthetic images? One network and one recipe on several training sets.

python -m diffseg.experiments.ladder mini-voc [--rungs without --without mini-voc-without]
    results/tables/ladder.csv (means over seeds), ladder_seeds.csv (a row a training), ladder.json,
    results/figures/ladder.png and .pdf

The rungs are real images with ground-truth masks; a run's synthetic images with the masks that the mini world's oracle
sees in them (what is lost to real is the images' fault, and its own errors'); the same images with the run's masks
(what is lost further is the masks'), by a baseline and by the run's own robust training; a run that lacks LoRA alone; a
run with none of the techniques. All other rungs train baselines. Sets are of equal size.
Seeds are of the training: initial decoder, order and augmentation; all of them train on the same images.
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch.utils.data import Dataset, Subset

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.readers import data_folder, open_split, pictures_set
from diffseg.charts import dots
from diffseg.errors import DiffsegError
from diffseg.experiments.mask_ablation import load_reference
from diffseg.experiments.paired import (
    Relabelled,
    images_key,
    options_of,
    paired_gain,
    parser_of,
    real_key,
    recipe_of,
    scores,
    trained,
    training_parameters,
)
from diffseg.figures import COLOURS, WIDTH, save_figure
from diffseg.files import read_rows, write_rows, write_text
from diffseg.lab.batch import resolve
from diffseg.lab.manifests import read_json
from diffseg.lab.provenance import provenance
from diffseg.lab.report import OURS, REAL, ROBUST

ORACLE, UNTUNED, WITHOUT = (
    "synthetic images, the oracle's masks",
    "no LoRA, else as ours",
    "none of the techniques",
)
COLUMNS = "benchmark", "split", "rung", "images", "mode", "seed", "miou"  # of a training; merged classes follow
RUNGS = {"real": REAL, "oracle": ORACLE, "robust": ROBUST, "ours": OURS, "untuned": UNTUNED, "without": WITHOUT}


def training_set(rung: str, benchmark: Benchmark, run: Path, real: Dataset) -> Dataset:
    """Return a rung's images with their labels; `run` is the run that made the synthetic ones."""
    synthetic = pictures_set(run / "03_synthesis", benchmark)
    if rung == "oracle":
        oracle = load_reference("mini", benchmark).eval()
        return Relabelled(synthetic, lambda name, image, *_: oracle(image[None].float() / 255)[0].argmax(dim=0))
    if rung != "real":
        return synthetic
    count = min(len(synthetic), len(real))  # spread over the list, as in step 4
    return Subset(real, [k * len(real) // count for k in range(count)])


def climb(chosen: argparse.Namespace) -> tuple[list[dict], dict[str, str], dict]:
    """Train and score every rung and seed that is not there yet; return a row each, mIoU in %, the key of the images of
    each run that gave some, and the parameters of the trainings."""
    values, run = resolve(chosen.run, {})
    named = {"without": chosen.without, "untuned": chosen.untuned}
    if unnamed := [f"--{rung}" for rung in chosen.rungs if named.get(rung) == ""]:
        raise DiffsegError(f"these rungs train on another run's images; name it with {' and '.join(unnamed)}.")
    parameters, rows = training_parameters(values), []
    used: dict[str, str] = {}
    benchmark, root = get_benchmark(parameters["benchmark"]), data_folder(parameters["data_root"])
    real = open_split(benchmark, root, parameters["training_split"] or benchmark.training_split)
    scored = open_split(benchmark, root, chosen.split or benchmark.evaluation_split)
    folder = chosen.folder / parameters["run"]
    for rung in chosen.rungs:
        source = run.with_name(named.get(rung, run.name))
        images = images_key(source)  # refuses an unfinished step 3, whose size the real images take, too
        dataset = training_set(rung, benchmark, source, real)
        options = options_of(parameters, parameters["training_mode"] if rung == "robust" else "baseline")
        if rung == "real":
            images = real_key(parameters, root, len(dataset))
        else:
            used[source.name] = images
        for seed in range(chosen.seeds):
            network = trained(folder, rung, images, parameters, options, dataset, benchmark, seed)
            row = {"benchmark": parameters["run"], "split": chosen.split or "validation", "rung": RUNGS[rung]}
            row |= {"images": len(dataset), "mode": options.training_mode, "seed": seed}
            rows.append(row | {name: f"{value:.2f}" for name, value in scores(network, scored, benchmark).items()})
            print(*rows[-1].values(), sep=", ", flush=True)
    return rows, used, parameters


def still_true(
    kept: Sequence[dict], made: Sequence[dict], redrawn: Collection[str], named: Mapping[str, str]
) -> list[dict]:
    """Return the rows of earlier calls that were not made again and whose images are still those of the run.

    Of a run that was drawn anew in another number the real images' rows go, too: sets are of equal size.

    redrawn: runs whose images are others now; `made` are then on the new ones. named: rung -> the run that gives its
    images, where it is not the one in whose name its rows stand.
    """
    again = {(row["benchmark"], row["split"], row["rung"], int(row["seed"])) for row in made}
    sizes = {(row["benchmark"], int(row["images"])) for row in made}
    old = {(name, RUNGS[rung]) for name in redrawn for rung in ("oracle", "robust", "ours")}
    old |= {(row["benchmark"], RUNGS[rung]) for row in made for rung, name in named.items() if name in redrawn}
    return [
        row
        for row in kept
        if (row["benchmark"], row["split"], row["rung"], int(row["seed"])) not in again
        and (row["benchmark"], row["rung"]) not in old
        and not (row["benchmark"] in redrawn and (row["benchmark"], int(row["images"])) not in sizes)
    ]


def means(rows: Sequence[dict]) -> list[dict]:
    """Return a row for each benchmark, split and rung: mean and standard deviation over seeds, share of real, and what
    the run's own images and masks gain over it: the mean difference of equal seeds with its 95 % interval. Merged
    classes (Human, Vehicle) have their mean where all trainings have them, and their gain over the seeds that do."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["split"], row["rung"]), []).append(row)
    merged = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in COLUMNS]
    score = {key: mean(float(row["miou"]) for row in some) for key, some in groups.items()}
    found = []
    for key, some in groups.items():
        values = [float(row["miou"]) for row in some]
        real = score.get((*key[:2], REAL))
        row = dict(zip(("benchmark", "split", "rung"), key, strict=True))
        row |= {"images": some[0]["images"], "mode": some[0]["mode"], "seeds": len(some), "miou": f"{score[key]:.1f}"}
        row |= {"miou_spread": f"{stdev(values):.1f}" if len(values) > 1 else ""}
        row |= {"ratio": f"{score[key] / real:.2f}" if real else ""}
        ours, others = groups.get((*key[:2], OURS), []), some if key[2] != OURS else []
        row |= gains(ours, others, "miou", "ours_gains")
        for name in merged:
            known = [float(each[name]) for each in some if each.get(name)]
            row[name] = f"{mean(known):.1f}" if len(known) == len(some) else ""
            row |= gains(ours, others, name, f"{name}_ours_gains")
        found.append(row)
    return found


def gains(ours: Sequence[dict], others: Sequence[dict], measure: str, column: str) -> dict[str, str]:
    """Return the paired gain of `ours` over other trainings in a measure, with its interval; "" where there is none."""
    of_seed = [{int(row["seed"]): float(row[measure]) for row in some if row.get(measure)} for some in (ours, others)]
    names = column, f"{column}_low", f"{column}_high"
    return {k: "" if isnan(v) else f"{v:.1f}" for k, v in zip(names, paired_gain(*of_seed), strict=True)}


def ladder_figure(rows: Sequence[dict]) -> Figure:
    """Draw the mean of each rung, its 95 % interval over seeds and each seed, a panel a benchmark: on the validation
    split, or where there is nothing of it on the others."""
    rows = [row for row in rows if row["split"] == "validation"] or rows
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    rungs = [rung for rung in RUNGS.values() if any(row["rung"] == rung for row in rows)]
    size = (min(WIDTH, 3.3 + 2 * len(names)), 0.7 + 0.25 * len(rungs))  # the rungs' names stand once, at the left
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        for place, rung in enumerate(rungs):
            scores = [float(row["miou"]) for row in rows if row["benchmark"] == name and row["rung"] == rung]
            if scores:
                dots(axis, [place], [scores], color=COLOURS[0], marker="o")
                axis.text(mean(scores), place - 0.25, f"{mean(scores):.1f}", ha="center", va="bottom", fontsize=7)
        axis.set(title=name, xlabel="mIoU (%)", ylim=(len(rungs) - 0.5, -0.8))
        axis.margins(x=0.12)
        axis.grid(axis="x", color="0.92")
        axis.set_yticks(range(len(rungs)), rungs)
    figure.tight_layout()
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, "ladder")
    parser.add_argument("run", help="name of a parameter file whose run has step 3")
    parser.add_argument("--without", default="", help="name of the run with none of the techniques")
    parser.add_argument("--untuned", default="", help="name of the run that differs by lora_scale=0 alone")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=["real", "oracle", "robust", "ours"])
    chosen = parser.parse_args(arguments)
    table = chosen.out / "tables" / "ladder_seeds.csv"
    rows, used, parameters = climb(chosen)
    recipe = recipe_of(parameters)
    recorded = read_json(table.with_name("ladder.json")) or {}
    known, trained_with, name = recorded.get("images", {}), recorded.get("parameters", {}), rows[0]["benchmark"]
    kept = read_rows(table) if table.is_file() else []  # other benchmarks and rungs stay
    if trained_with.get(name) != recipe:
        kept = [row for row in kept if row["benchmark"] != name]
    redrawn = {name for name in used if known.get(name, used[name]) != used[name]}
    rows = still_true(kept, rows, redrawn, {"without": chosen.without, "untuned": chosen.untuned}) + rows
    write_rows(table, rows, list(dict.fromkeys(name for row in rows for name in row)))
    write_rows(chosen.out / "tables" / "ladder.csv", means(rows))
    about = {"images": known | used, "parameters": trained_with | {name: recipe}, **provenance()}
    write_text(table.with_name("ladder.json"), json.dumps(about, indent=1))
    figure = ladder_figure(rows)
    save_figure(figure, chosen.out / "figures" / "ladder.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
