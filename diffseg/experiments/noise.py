"""Which errors of the masks does robust training survive? Ground-truth masks with injected label noise of four kinds.

python -m diffseg.experiments.noise mini-voc [--set iterations=200] [--split dev] [--seeds 1]
    results/tables/noise.csv (means, and paired gains over the ensemble with their intervals), noise_seeds.csv (a row a
    training), noise.json, results/figures/noise.png and .pdf

The claim should not hang on one generator's masks, whose errors nobody knows; here they are made. Reliability cannot
come from attention, as there is none: a pixel's margin is its distance to the nearest edge of the DISTURBED mask. So
it knows where a mask ends, not where it is wrong: that speaks of errors along edges (dilation, shift), and says
nothing of a dropped object or a wrong class. The restricted and the edge-aware co-training take the disturbed
mask's classes for those of the image, so they cannot undo a wrong class.
"""

import argparse
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.metrics import ConfusionMatrix, mean_iou
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.charts import mean_interval, mean_lines
from diffseg.errors import DiffsegError
from diffseg.experiments.paired import (
    options_of,
    parser_of,
    real_key,
    recipe_of,
    score,
    trained,
    with_earlier,
    write_tables,
)
from diffseg.experiments.robust import ARMS, parameters_under
from diffseg.figures import WIDTH, save_figure
from diffseg.lab.provenance import provenance
from diffseg.reliability import rank_within_class
from diffseg.seeds import derive_seed

# Kind of noise -> strengths: pixels of 64 for the first two, probability per object for the others.
STRENGTHS = {"dilation": (2, 4, 6), "shift": (2, 4, 8), "dropped": (0.1, 0.25, 0.5), "wrong class": (0.1, 0.25, 0.5)}
COMPARED = ("ensemble", "edge-aware", "restricted", "BECO")
FARTHEST = 16  # pixels from an edge beyond which reliability no longer grows; a quarter of an image, our choice


def disturb(label: torch.Tensor, kind: str, strength: float, seed: int, classes: int, ignore: int) -> torch.Tensor:
    """Disturb a ground-truth mask (int64 H x W; 0 = background, 1..classes-1, ignore stays); strength 0: as it is.

    dilation: objects grow by `strength` pixels (the larger id wins where two meet); shift: the mask moves by
    `strength` pixels in a random direction, background comes in; dropped: each class of the image becomes background
    with probability `strength`; wrong class: it becomes another class. Raises a DiffsegError for another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    objects = label.masked_fill(label == ignore, 0)
    if kind == "dilation":
        side = 2 * round(strength) + 1
        grown = F.max_pool2d(objects[None].float(), side, 1, round(strength))[0].long()
        noisy = torch.where(objects > 0, objects, grown)
    elif kind == "shift":
        angle = 2 * torch.pi * torch.rand((), generator=generator).item()
        down, right = round(strength * np.sin(angle)), round(strength * np.cos(angle))
        reach = round(strength)
        height, width = label.shape
        padded = F.pad(objects, (reach, reach, reach, reach))
        noisy = padded[reach - down : reach - down + height, reach - right : reach - right + width]
    elif kind in ("dropped", "wrong class"):
        noisy = objects.clone()
        for value in objects.unique().tolist():
            hit = torch.rand((), generator=generator).item() < strength
            other = 1 + (value - 1 + int(torch.randint(1, classes - 1, (), generator=generator))) % (classes - 1)
            if value and hit:
                noisy[objects == value] = 0 if kind == "dropped" else other
    else:
        raise DiffsegError(f"there is no noise {kind!r}; choose one of {', '.join(STRENGTHS)}")
    return torch.where(label == ignore, label, noisy)


def distance_margin(label: torch.Tensor, farthest: int = FARTHEST) -> torch.Tensor:
    """Return how far each pixel of a mask (int64 H x W) is from its edges: uint8, 0 at an edge, 255 from `farthest`.

    Distances count king's moves; a mask without an edge is 255 all over.
    """
    value = label[None].float()
    reached = (F.max_pool2d(value, 3, 1, 1) != -F.max_pool2d(-value, 3, 1, 1)).float()
    distance = torch.zeros_like(reached)
    for _ in range(farthest):
        distance += 1 - reached
        reached = F.max_pool2d(reached, 3, 1, 1)
    return (distance[0] * 255 / farthest).round().to(torch.uint8)


class Disturbed(Dataset):
    """Images whose masks are disturbed, each in a way that only the seed decides; items as a synthetic set's."""

    def __init__(self, pictures: Dataset, kind: str, strength: float, seed: int, benchmark: Benchmark):
        self.pictures, self.kind, self.strength, self.seed = pictures, kind, strength, seed
        self.classes, self.ignore = benchmark.num_classes, benchmark.ignore

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        name, image, label = self.pictures[index][:3]
        seed = derive_seed(self.seed, "noise", self.kind, index)
        noisy = disturb(label, self.kind, self.strength, seed, self.classes, self.ignore)
        margin = distance_margin(noisy)
        return name, image, noisy, torch.stack([margin, rank_within_class(noisy, margin)])


def label_miou(pictures: Dataset, noisy: Dataset, benchmark: Benchmark) -> float:
    """Return the mIoU of the disturbed masks against the ground truth in %: how strong the noise is."""
    matrix = ConfusionMatrix(benchmark.num_classes, benchmark.ignore)
    for k in range(len(pictures)):
        label = noisy[k][2]
        matrix.update(pictures[k][2], label.masked_fill(label == benchmark.ignore, 0))
    return 100 * float(mean_iou(matrix.class_sums, benchmark.protocol))


def trainings(chosen: argparse.Namespace, parameters: dict) -> list[dict]:
    """Train every arm on every noise that is not there yet, and return a row each, mIoU in %."""
    benchmark, rows = get_benchmark(parameters["benchmark"], parameters["class_list"]), []
    if benchmark.classes[0] != "background":
        raise DiffsegError(
            f"{benchmark.name} has no background for dropped objects; take the parameters of another one."
        )
    folder = chosen.folder / parameters["run"]
    root = data_folder(parameters["data_root"])
    pictures = open_split(benchmark, root, parameters["training_split"] or benchmark.training_split)
    scored = open_split(benchmark, root, chosen.split or benchmark.evaluation_split)
    noises = [("none", 0.0), *((kind, strength) for kind in chosen.kinds for strength in STRENGTHS[kind])]
    arms = [arm for arm in COMPARED if arm in {"ensemble", *chosen.arms}]  # gains are over the ensemble
    for seed in range(chosen.seeds):
        for kind, strength in noises:
            noisy = Disturbed(pictures, "dropped" if kind == "none" else kind, strength, seed, benchmark)
            labels = label_miou(pictures, noisy, benchmark)
            for arm in arms:
                options = options_of(parameters | ARMS[arm], ARMS[arm]["training_mode"])
                # `labels` stands for the disturbed masks, which follow from this module's code, too
                how = folder, arm, real_key(parameters, root, kind, strength, labels), parameters, options
                network = trained(*how, noisy, benchmark, seed)
                row = {"kind": kind, "strength": strength, "arm": arm, "seed": seed, "label_miou": round(labels, 2)}
                rows.append(row | {"miou": round(score(network, scored, benchmark), 2)})
                print(*rows[-1].values(), sep=", ", flush=True)
    return rows


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each noise and arm: means over seeds, and the paired gain over the ensemble (mIoU in %) with a
    95 % interval of Student's t."""
    found = []
    for (kind, strength), group in rows.groupby(["kind", "strength"], sort=False):
        scores = group.pivot(index="seed", columns="arm", values="miou")
        for arm in [arm for arm in COMPARED if arm in scores]:
            row = {"kind": kind, "strength": strength, "arm": arm, "seeds": int(scores[arm].count())}
            row |= {"label_miou": group.label_miou.mean(), "miou": scores[arm].mean()}
            gain = mean_interval((scores[arm] - scores["ensemble"]).dropna().tolist())  # the mean of one seed, too
            names = "over_ensemble", "over_ensemble_low", "over_ensemble_high"
            found.append(row | dict(zip(names, gain, strict=True)))
    return pd.DataFrame(found).round(2)


def noise_figure(rows: pd.DataFrame) -> Figure:
    """Draw mIoU over strength (0: ground truth), a panel a kind, a line an arm: means, 95 % intervals over seeds."""
    kinds = [kind for kind in STRENGTHS if kind in set(rows.kind)]
    arms = [arm for arm in COMPARED if arm in set(rows.arm)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 2.3), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        tried = rows.arm.isin(rows[rows.kind == kind].arm)
        mean_lines(axis, rows[tried & rows.kind.isin(["none", kind])], "strength", arms)
        axis.set_xticks([0, *STRENGTHS[kind]], [f"{strength:g}" for strength in (0, *STRENGTHS[kind])])
        axis.set(title=kind, xlabel="pixels" if kind in ("dilation", "shift") else "probability per object")
    axes[0, 0].set(ylabel="mIoU (%)")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    drawn = {line.get_label(): line for axis in axes[0] for line in axis.containers}
    figure.legend(drawn.values(), drawn.keys(), loc="upper center", ncols=len(drawn))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "noise", seeds=3)
    parser.add_argument("parameters", help="name of a parameter file, whose training all arms share")
    parser.add_argument("--set", metavar="NAME=VALUE", nargs="+", default=[], help="changed parameters")
    parser.add_argument("--kinds", nargs="+", choices=STRENGTHS, default=list(STRENGTHS))
    parser.add_argument("--arms", nargs="+", choices=COMPARED, default=list(COMPARED))
    chosen = parser.parse_args(arguments)
    parameters, tables = parameters_under(chosen.parameters, chosen.set), chosen.out / "tables"
    about = {"split": chosen.split or "validation", "parameters": recipe_of(parameters)}
    rows = pd.DataFrame(trainings(chosen, parameters))
    rows = with_earlier(rows, tables / "noise_seeds.csv", ["kind", "strength", "arm", "seed"], about)
    write_tables(tables, "noise", means(rows), rows, about | provenance())
    save_figure(noise_figure(rows), chosen.out / "figures" / "noise.png")


if __name__ == "__main__":
    main()
