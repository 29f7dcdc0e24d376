"""Does reliability-aware training gain more than baselines and their ensemble? One drawn set, paired seeds.

python -m diffseg.experiments.robust mini-voc --runs mini-voc mini-voc-unrefined [--split dev] [--seeds 5]
    results/tables/robust_arms.csv (means, paired differences, their intervals), robust_arms_seeds.csv (a row a
    training), robust_arms.json, results/figures/robust_arms.png and .pdf

All arms train on the images and masks of a run's step 3, as the parameter file says, but for what ARMS changes. A
baseline costs nothing of its own: it is the first network of the ensemble of the same seed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.readers import data_folder, open_split, pictures_set
from diffseg.charts import dots
from diffseg.cotraining import classes_of_images, restricted
from diffseg.errors import DiffsegError
from diffseg.experiments.label_or_network import AGREED, RELIABLE, accuracies, edges_alone, tenths
from diffseg.experiments.paired import (
    Relabelled,
    images_key,
    named_fields,
    options_of,
    paired_gain,
    parser_of,
    recipe_of,
    score,
    trained,
    training_parameters,
    write_tables,
)
from diffseg.figures import COLOURS, MARKERS, WIDTH, save_figure
from diffseg.lab.batch import resolve
from diffseg.lab.manifests import read_json
from diffseg.lab.parameters import parse_assignments
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import run_folder
from diffseg.reliability import reliable_pixels
from diffseg.segmenters import Ensemble
from diffseg.training_options import TrainingOptions

BECO = {
    "training_mode": "cotrain",
    "reliable_share": 0.5,
    "reliable_rule": "picture",
    "warmup": 0.25,
    "warmup_pixels": "reliable",
    "peer_classes": "all",
    "peer_refiner": "none",
    "peer_target": "hard",
    "mixing": 0.5,
}
# Doubt few pixels, late, among the image's classes: our choice, on the development split.
RESTRICTED = BECO | {
    "reliable_share": 0.9,
    "warmup": 0.5,
    "warmup_pixels": "all",
    "peer_classes": "image",
    "mixing": 0.0,
}
# An answer that follows the image's edges may replace twice as many labels: our choice, on that split.
EDGE_AWARE = RESTRICTED | {"peer_refiner": "pamr", "reliable_share": RELIABLE}
ONE_NETWORK = EDGE_AWARE | {"training_mode": "selftrain"}  # the default; a tenth dearer than a baseline
WITHOUT_NETWORK = "edges without a network"
ARMS = {
    "ensemble": {"training_mode": "ensemble"},
    "baseline, twice as long": {"training_mode": "baseline"},  # as dear as two networks
    "BECO": BECO,
    "restricted": RESTRICTED,
    "edge-aware": EDGE_AWARE,
    "edge-aware, one network": ONE_NETWORK,
    "edge-aware, one network, twice as long": ONE_NETWORK,  # as dear as edge-aware
    # a baseline on labels that PAMR alone makes in the doubted fifth: what of the gain needs no network
    WITHOUT_NETWORK: {"training_mode": "baseline"},
    # the one network taken apart, one thing at a time
    "a tenth doubted": ONE_NETWORK | {"reliable_share": 0.9},
    "half doubted": ONE_NETWORK | {"reliable_share": 0.5},
    "share of the set": ONE_NETWORK | {"reliable_rule": "set"},
    "warm-up of a quarter": ONE_NETWORK | {"warmup": 0.25},
    "any class named": ONE_NETWORK | {"peer_classes": "all"},
    "soft targets": ONE_NETWORK | {"peer_target": "soft"},
    "with pasting": ONE_NETWORK | {"mixing": 0.5},
    "without edges": ONE_NETWORK | {"peer_refiner": "none"},
    "second round": {"training_mode": "ensemble"},  # see ROUNDS
    "second round, two votes": {"training_mode": "ensemble"},
}


def background_of(benchmark: Benchmark) -> int | None:
    return benchmark.classes.index("background") if "background" in benchmark.classes else None


def along_edges(images: Dataset, benchmark: Benchmark) -> Relabelled:
    """Return a synthetic set whose doubtful pixels, those of EDGE_AWARE, have what PAMR makes of the reliable ones."""

    def relabel(name: str, image: torch.Tensor, label: torch.Tensor, reliability: torch.Tensor) -> torch.Tensor:
        ignored = label == benchmark.ignore
        reliable = reliable_pixels(reliability[1], RELIABLE) & ~ignored
        found = edges_alone(image.float() / 255, label, reliable, benchmark.num_classes, background_of(benchmark))
        return torch.where(reliable | ignored, label, found)

    return Relabelled(images, relabel)


def peer_answers(network: Ensemble, image: torch.Tensor, label: torch.Tensor, benchmark: Benchmark) -> torch.Tensor:
    """Return a network's probabilities among the label's classes and background, K x H x W on the CPU."""
    device = PartialState().device
    seen = network(image[None].float().to(device) / 255).float().softmax(dim=1).cpu()
    return restricted(seen, classes_of_images(label[None], benchmark.num_classes), background_of(benchmark))[0]


def corrected(images: Dataset, network: Ensemble, benchmark: Benchmark) -> Relabelled:
    """Return a synthetic set whose doubtful pixels, those of RESTRICTED, have a network's answer among the image's
    classes and background."""

    def relabel(name: str, image: torch.Tensor, label: torch.Tensor, reliability: torch.Tensor) -> torch.Tensor:
        answer = peer_answers(network, image, label, benchmark).argmax(dim=0)
        kept = reliable_pixels(reliability[1], RESTRICTED["reliable_share"]) | (label == benchmark.ignore)
        return torch.where(kept, label, answer)

    return Relabelled(images, relabel)


def voted(images: Dataset, network: Ensemble, benchmark: Benchmark) -> Relabelled:
    """Return a synthetic set whose labels follow from two noisy votes: a network's probabilities; and the label, right
    as often as two agreeing networks say of its tenth of the margins, and else any other class of the image.

    They count as independent, which they are not: the network was trained on these labels."""
    believed = torch.tensor([row[AGREED] for row in accuracies(images, network, network.networks)])

    def relabel(name: str, image: torch.Tensor, label: torch.Tensor, reliability: torch.Tensor) -> torch.Tensor:
        answer, right = peer_answers(network, image, label, benchmark), believed[tenths(reliability[1])]
        others = ((answer > 0).flatten(1).any(dim=1).sum() - 1).clamp(min=1)
        own = torch.arange(len(answer))[:, None, None] == label
        vote = (answer * torch.where(own, right, (1 - right) / others)).argmax(dim=0)
        return torch.where(label == benchmark.ignore, label, vote)

    return Relabelled(images, relabel)


ROUNDS = {"second round": corrected, "second round, two votes": voted}  # new labels by the ensemble of the first round


def scores_of(
    parameters: dict, run: Path, title: str, arms: Sequence[str], seeds: int, split: str, folder: Path
) -> list[dict]:
    """Train each arm and seed that is not in `folder` yet; return a row for each network and pair, mIoU in %.

    parameters: those of step 4. run: the folder of the run whose images and masks are trained on. title: its name in
    the table.
    """
    key = images_key(run)
    benchmark, rows = get_benchmark(parameters["benchmark"], parameters["class_list"]), []
    dataset, split = pictures_set(run / "03_synthesis", benchmark), split or benchmark.evaluation_split
    scored = open_split(benchmark, data_folder(parameters["data_root"]), split)
    for arm in arms:
        changes = ARMS[arm]
        options = options_of(parameters | changes, changes["training_mode"])
        if arm.endswith("twice as long"):
            options = replace(options, iterations=2 * options.iterations)
        labelled = along_edges(dataset, benchmark) if arm == WITHOUT_NETWORK else dataset
        for seed in range(seeds):
            how = key, parameters, options
            if arm in ROUNDS:
                first = trained(folder / run.name, "ensemble", *how, dataset, benchmark, seed)
                labelled = ROUNDS[arm](dataset, first, benchmark)
            network = trained(folder / run.name, arm, *how, labelled, benchmark, seed)
            members = {f"{arm}, first network": network.networks[0]} if isinstance(network, Ensemble) else {}
            for name, each in ({arm: network} | members).items():
                miou = round(score(each, scored, benchmark), 2)
                rows.append({"run": title, "split": split, "arm": name, "seed": seed, "miou": miou, "images": key})
                print(title, split, name, seed, miou, sep=", ", flush=True)
    return rows


def parameters_under(name: str, assignments: Sequence[str]) -> dict:
    """Return step 4's parameters of a parameter file under NAME=VALUE; a name that the arms or steps 1 to 3 decide, and
    that would change nothing, raises a DiffsegError."""
    changes = parse_assignments(assignments)
    parameters = training_parameters(resolve(name, changes)[0])
    used = named_fields(TrainingOptions, parameters).keys() | {"training_precision", "data_root", "training_split"}
    used |= {"segmenter", "encoder_weights", "initial_network"}
    if idle := sorted(changes.keys() - (used - RESTRICTED.keys())):
        raise DiffsegError(
            f"--set {', '.join(idle)} changes nothing here: the arms or the run's steps 1 to 3 decide it."
        )
    return parameters


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run, split and arm: mean and standard deviation over seeds, and the paired differences to
    the ensemble and to the baseline (its first network), with a 95 % interval of Student's t."""
    found = []
    for (run, split), group in rows.groupby(["run", "split"], sort=False):
        scores = group.pivot(index="seed", columns="arm", values="miou")
        for arm in group.arm.unique():
            row = {"run": run, "split": split, "arm": arm, "seeds": int(scores[arm].count())}
            row |= {"miou": scores[arm].mean(), "miou_spread": scores[arm].std()}
            for name, other in (("ensemble", "ensemble"), ("baseline", "ensemble, first network")):
                gain = paired_gain(scores[arm].dropna().to_dict(), scores[other].to_dict())
                row |= dict(zip((f"over_{name}", f"over_{name}_low", f"over_{name}_high"), gain, strict=True))
            found.append(row)
    return pd.DataFrame(found).round(2)


def arms_figure(rows: pd.DataFrame) -> Figure:
    """Draw gains over the ensemble of the same seed, with 95 % intervals: on the left every arm, on the development
    split of the run that has most of them; on the right two arms, a row a run, on validation."""
    development, published, styles = rows[rows.split == "dev"], rows[rows.split != "dev"], {}
    panels = []  # title, names of the rows, and for each arm its place
    if len(development):
        run = development.groupby("run", sort=False).arm.nunique().idxmax()
        apart = development[development.run == run]
        arms = [arm for arm in ARMS if arm != "ensemble" and arm in set(apart.arm)]
        panels.append((f"{run}, development split", arms, [(k, apart, arm) for k, arm in enumerate(arms)]))
    compared = published[published.arm.isin(["edge-aware", "restricted"])]
    if runs := list(compared.run.unique()):
        styles = dict(zip(compared.arm.unique(), zip(COLOURS, MARKERS, strict=False), strict=False))
        of_run = [(k, published[published.run == name]) for k, name in enumerate(runs)]
        shown = [(k, some, arm) for k, some in of_run for arm in styles if arm in set(some.arm)]
        panels.append(("validation", runs, shown))
    size = (WIDTH, 1 + 0.2 * max((len(names) for _, names, _ in panels), default=0))
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=size, squeeze=False)
    for axis, (title, names, shown) in zip(axes[0], panels, strict=False):
        for place, some, arm in shown:
            scores = some.pivot(index="seed", columns="arm", values="miou")
            colour, marker = styles.get(arm, ("0.3", "o"))
            dots(axis, [place], [(scores[arm] - scores["ensemble"]).dropna().tolist()], color=colour, marker=marker)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_title(title, fontsize="medium")
        axis.set(ylim=(len(names) - 0.5, -0.5))
        axis.grid(axis="x", color="0.92")
        axis.set_yticks(range(len(names)), names)
    figure.supxlabel("gain over the ensemble (mIoU)", fontsize="medium")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    keys = [Line2D([], [], color=colour, marker=marker, label=arm) for arm, (colour, marker) in styles.items()]
    figure.legend(handles=keys, loc="upper right", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "robust-arms")
    parser.add_argument("parameters", help="name of a parameter file, whose training all arms share")
    parser.add_argument("--runs", nargs="+", required=True, help="names of runs whose images and masks are trained on")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="besides the ensemble")
    parser.add_argument("--set", metavar="NAME=VALUE", nargs="+", default=[], help="parameters, named in the table")
    chosen = parser.parse_args(arguments)
    parameters, rows, tables = parameters_under(chosen.parameters, chosen.set), [], chosen.out / "tables"
    recipe = recipe_of(parameters)
    about, changed = read_json(tables / "robust_arms.json") or {}, []
    others = [arm for arm, changes in about.get("arms", {}).items() if ARMS.get(arm) != changes]  # of earlier versions
    arms = [arm for arm in ARMS if arm in {"ensemble", *chosen.arms}]  # the ensemble is what others are compared with
    for name in chosen.runs:
        title, run = ", ".join([name, *chosen.set]), run_folder(name)
        if about.get(title, {}).get("parameters") != recipe:
            changed.append(title)
        about[title] = {"images": images_key(run), "parameters": recipe} | provenance()
        rows += scores_of(parameters, run, title, arms, chosen.seeds, chosen.split, chosen.folder)
    frame = pd.DataFrame(rows)
    if (found := tables / "robust_arms_seeds.csv").is_file():
        kept = pd.read_csv(found)  # other runs and arms stay, but for those of other images or another training
        kept = kept[~kept.run.isin(frame.run) | kept.images.isin(frame.images) & ~kept.run.isin(changed)]
        kept = kept[~kept.arm.str.removesuffix(", first network").isin(others)]
        frame = pd.concat([kept, frame]).drop_duplicates(["run", "split", "arm", "seed"], keep="last")
    write_tables(tables, "robust_arms", means(frame), frame, about | {"arms": ARMS})
    save_figure(arms_figure(frame), chosen.out / "figures" / "robust_arms.png")


if __name__ == "__main__":
    main()
