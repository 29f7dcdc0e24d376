"""How many labelled images do the words replace? Networks on n real images, alone and with synthetic ones.

python -m diffseg.experiments.label_efficiency mini-voc --finer mini-imagenet-s [--split dev] [--seeds 5]
    results/tables/label_efficiency.csv (means and paired gains), label_efficiency_seeds.csv (a row a training),
    label_efficiency.json, results/figures/label_efficiency.png and .pdf

Every network takes as many steps as the parameter file says, all in all. A seed chooses the labelled images, nested
over n, and the training's randomness; the synthetic images are those of the named runs for every seed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.data import ConcatDataset, Dataset, Subset

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.readers import data_folder, open_split, pictures_set
from diffseg.charts import mean_lines
from diffseg.experiments.paired import (
    images_key,
    network_folder,
    options_of,
    paired_gain,
    parser_of,
    real_key,
    recipe_of,
    score,
    trained,
    training_parameters,
    with_earlier,
    write_tables,
)
from diffseg.figures import WIDTH, save_figure
from diffseg.lab.batch import resolve
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import run_folder
from diffseg.seeds import derive_seed
from diffseg.training_options import TrainingOptions

COUNTS = (20, 45, 90, 180, 720)
ALONE, AFTER, FINER, MIXED = (
    "real images alone",
    "after synthetic images",
    "after synthetic images of finer classes",
    "mixed with synthetic images",
)
ARMS = (ALONE, AFTER, FINER, MIXED)
# Of the second half of a pretrained network's steps; chosen on the development split. None: the parameter file's.
RATES = {AFTER: 5e-4, FINER: None}


def trainings(chosen: argparse.Namespace, parameters: dict) -> list[dict]:
    """Train every arm, number and seed that is not there yet, and return a row each, mIoU in %.

    Pretrained networks take half of the steps on synthetic images (of their own classes) and half on the labelled
    ones. In a mixed set each labelled image is repeated, so that half of what the network sees is real.
    """
    benchmark, root = get_benchmark(parameters["benchmark"]), data_folder(parameters["data_root"])
    real = open_split(benchmark, root, parameters["training_split"] or benchmark.training_split)
    scored = open_split(benchmark, root, chosen.split or benchmark.evaluation_split)
    options, folder = options_of(parameters, "baseline"), chosen.folder / parameters["run"]
    half = replace(options, iterations=options.iterations // 2)
    finer = get_benchmark(resolve(chosen.finer, {})[0]["benchmark"])
    sets = {}  # arm -> key and images of its synthetic set, and their classes
    for arm, name, classes in ((AFTER, chosen.parameters, benchmark), (FINER, chosen.finer, finer)):
        run = run_folder(name)
        sets[arm] = images_key(run), pictures_set(run / "03_synthesis", classes), classes
    key, synthetic, _ = sets[AFTER]
    labels, rows = real_key(parameters, root), []

    def row(arm: str, count: int, seed: int, images: str, start: dict, how: TrainingOptions, dataset: Dataset) -> None:
        name = f"{ARMS.index(arm)}-{count}"
        network = trained(folder, name, images, parameters | start, how, dataset, benchmark, seed)
        rows.append({"arm": arm, "labelled": count, "seed": seed, "miou": round(score(network, scored, benchmark), 2)})
        print(*rows[-1].values(), sep=", ", flush=True)

    for seed in range(chosen.seeds):
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(derive_seed(seed, "labelled")))
        starts = {}
        for arm, (made, dataset, classes) in sets.items():
            how = folder, f"start-{ARMS.index(arm)}", made, parameters, half
            trained(*how, dataset, classes, seed)
            starts[arm] = {"initial_network": str(network_folder(*how, seed).resolve())}
        row(AFTER, 0, seed, key, {}, options, synthetic)
        for count in chosen.counts:
            some = Subset(real, order[:count].tolist())
            row(ALONE, count, seed, labels, {}, options, some)
            for arm, rate in RATES.items():
                second = replace(half, learning_rate=rate or half.learning_rate)
                row(arm, count, seed, labels, starts[arm], second, some)
            both = ConcatDataset([synthetic, *[some] * max(1, len(synthetic) // count)])
            row(MIXED, count, seed, f"{key} {labels}", {}, options, both)
    return rows


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each number of labelled images and arm: mean and standard deviation over seeds, and the paired
    gain over as many real images alone, with a 95 % interval of Student's t."""
    found, scores = [], rows.pivot(index="seed", columns=["labelled", "arm"], values="miou")
    for (count, arm), group in rows.groupby(["labelled", "arm"], sort=False):
        row = {"arm": arm, "labelled": count, "seeds": len(group)}
        row |= {"miou": group.miou.mean(), "miou_spread": group.miou.std()}
        if count and arm != ALONE:
            gain = paired_gain(scores[count, arm].dropna().to_dict(), scores[count, ALONE].dropna().to_dict())
            row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        found.append(row)
    return pd.DataFrame(found).sort_values(["labelled", "arm"], kind="stable").round(2)


def label_figure(rows: pd.DataFrame) -> Figure:
    """Draw mIoU over the number of labelled images, a line an arm, with 95 % intervals over seeds; the network on
    synthetic images alone is a horizontal line."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.8))
    axis.axhline(rows[rows.labelled == 0].miou.mean(), color="0.3", linestyle="--", label="synthetic images alone")
    mean_lines(axis, rows[rows.labelled > 0], "labelled", ARMS)
    counts = sorted(set(rows.labelled) - {0})
    axis.set(xscale="log", xlabel="labelled real images", ylabel="mIoU (%)")
    axis.set_xticks(counts, list(map(str, counts)))
    axis.minorticks_off()
    axis.grid(axis="y", color="0.92")
    axis.legend(loc="lower right")
    figure.tight_layout()
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "label-efficiency")
    parser.add_argument("parameters", help="name of a parameter file whose run has step 3")
    parser.add_argument("--finer", required=True, help="name of a parameter file of finer classes whose run has step 3")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of labelled images")
    chosen = parser.parse_args(arguments)
    tables, runs = chosen.out / "tables", (chosen.parameters, chosen.finer)
    parameters = training_parameters(resolve(chosen.parameters, {})[0])
    about = {"images": {name: images_key(run_folder(name)) for name in runs}, "split": chosen.split or "validation"}
    about["parameters"] = recipe_of(parameters)
    frame = pd.DataFrame(trainings(chosen, parameters))
    frame = with_earlier(frame, tables / "label_efficiency_seeds.csv", ["arm", "labelled", "seed"], about)
    write_tables(tables, "label_efficiency", means(frame), frame, about | provenance())
    save_figure(label_figure(frame), chosen.out / "figures" / "label_efficiency.png")


if __name__ == "__main__":
    main()
