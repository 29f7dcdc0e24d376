"""Does robust training survive known noise? Ground-truth masks of mini VOC with injected label noise of four kinds.
The baseline is the first of the ensemble's two networks: bit-identical to one that was trained alone (a test says so).

python -m diffseg.experiments.noise    results/tables/noise.csv (means and spreads over seeds), noise_seeds.csv
                                         (a row a training) and noise.json, results/figures/noise.png and .pdf

They start from the network of a finished run (`diffseg run mini-imagenet-s --only 1-4`); --initial-network "" has none.

The claim should not hang on one generator's masks, whose errors nobody knows; here they are made. Reliability cannot
come from attention, as there is none: a pixel's margin is its distance to the nearest edge of the DISTURBED mask. So
it knows where a mask ends, not where it is wrong: that speaks of errors along edges (dilation, shift), and says
nothing of a dropped object or a wrong class, where all that can help is that two networks contradict the label.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.evaluation import evaluate
from diffseg.benchmarks.metrics import ConfusionMatrix, mean_iou
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.charts import half_interval
from diffseg.errors import DiffsegError
from diffseg.figures import COLOURS, MARKERS, WIDTH, save_figure
from diffseg.files import atomic_path, read_rows, write_rows
from diffseg.lab.manifests import read_json
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import named_files
from diffseg.paths import project_root
from diffseg.reliability import rank_within_class
from diffseg.seeds import derive_seed
from diffseg.segmenters import new_networks
from diffseg.training import NETWORKS, TrainingOptions, train

# Kind of noise -> strengths: pixels of 64 for the first two, probability per object for the others.
STRENGTHS = {"dilation": (3, 6), "shift": (4, 8), "dropped": (0.25, 0.5), "wrong class": (0.25, 0.5)}
MODES = ("ensemble", "cotrain")
START = "results/runs/mini-imagenet-s/04_robust_training/synthetic"  # 300 steps from scratch make no teacher
LINES = {"baseline": "baseline", "ensemble": "ensemble of two", "cotrain": "co-trained"}  # mode -> its name
FARTHEST = 16  # pixels from an edge beyond which reliability no longer grows; a quarter of an image, our choice
COLUMNS = ("kind", "strength", "mode", "seed", "label_miou", "miou", "seconds")  # mIoU in %


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

    def __init__(self, pictures: Dataset, kind: str, strength: float, seed: int):
        self.pictures, self.kind, self.strength, self.seed = pictures, kind, strength, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        name, image, label = self.pictures[index][:3]
        seed = derive_seed(self.seed, "noise", self.kind, index)
        noisy = disturb(label, self.kind, self.strength, seed, VOC.num_classes, VOC.ignore)
        margin = distance_margin(noisy)
        return name, image, noisy, torch.stack([margin, rank_within_class(noisy, margin)])


def label_miou(pictures: Dataset, noisy: Dataset) -> float:
    """Return the mIoU of the disturbed masks against the ground truth, 0..1: how strong the noise is."""
    matrix = ConfusionMatrix(VOC.num_classes, VOC.ignore)
    for k in range(len(pictures)):
        matrix.update(pictures[k][2], noisy[k][2].masked_fill(noisy[k][2] == VOC.ignore, 0))
    return float(mean_iou(matrix.class_sums, VOC.protocol))


def means(rows: list[dict]) -> list[dict]:
    """Return a row for each noise and mode: mean and standard deviation of the mIoU over seeds, means of the rest."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["strength"], row["mode"]), []).append(row)
    found = []
    for (kind, strength, mode), some in groups.items():
        label_miou, miou, seconds = ([float(row[name]) for row in some] for name in ("label_miou", "miou", "seconds"))
        row = {"kind": kind, "strength": strength, "mode": mode, "seeds": len(some)}
        row |= {"label_miou": f"{mean(label_miou):.1f}", "miou": f"{mean(miou):.1f}"}
        row |= {"miou_spread": f"{stdev(miou):.1f}" if len(some) > 1 else "", "seconds": round(mean(seconds), 1)}
        found.append(row)
    return found


def noise_figure(rows: list[dict]) -> Figure:
    """Draw mIoU over strength (0: ground truth), a panel a kind, a line a mode: means, 95 % intervals over seeds."""
    kinds = [kind for kind in STRENGTHS if any(row["kind"] == kind for row in rows)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 2.3), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for (mode, name), colour, marker in zip(LINES.items(), COLOURS, MARKERS, strict=False):
            scores: dict[float, list[float]] = {}
            for row in rows:
                if row["mode"] == mode and row["kind"] in ("none", kind):
                    scores.setdefault(float(row["strength"]), []).append(float(row["miou"]))
            strengths = sorted(scores)
            if strengths:
                means, halves = zip(*((np.mean(scores[s]), half_interval(scores[s])) for s in strengths), strict=True)
                axis.errorbar(strengths, means, halves, marker=marker, capsize=2, label=name, color=colour)
        axis.set_xticks([0, *STRENGTHS[kind]], [f"{strength:g}" for strength in (0, *STRENGTHS[kind])])
        axis.set(title=kind, xlabel="pixels" if kind in ("dilation", "shift") else "probability per object")
    axes[0, 0].set(ylabel="mIoU on mini VOC val (%)", ylim=(0, None))
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(LINES))
    return figure


def study(folder: Path, chosen: argparse.Namespace) -> list[dict]:
    """Train every mode on every noise, write the rows as they come, and the figure and manifest at the end.

    An interrupted study resumes with the rows that are missing, if its settings are the same.
    """
    device, started = PartialState().device, time.time()
    table, manifest = folder / "tables" / "noise_seeds.csv", folder / "tables" / "noise.json"
    settings = {name: value for name, value in vars(chosen).items() if name not in ("seeds", "out", "kinds", "modes")}
    settings["files"] = named_files(settings)  # another network under the same name is another study
    rows: list[dict] = []
    if table.is_file() and (read_json(manifest) or {}).get("settings") == settings:
        rows = read_rows(table)
    done = {(row["kind"], float(row["strength"]), row["mode"], int(row["seed"])) for row in rows}
    root = data_folder("mini")
    pictures, validation = open_split(VOC, root, VOC.training_split), open_split(VOC, root, VOC.evaluation_split)
    pictures = Subset(pictures, range(min(chosen.images, len(pictures))))
    noises = [("none", 0.0), *((kind, strength) for kind in chosen.kinds for strength in STRENGTHS[kind])]
    for seed in range(chosen.seeds):
        for kind, strength in noises:
            noisy = Disturbed(pictures, "dropped" if kind == "none" else kind, strength, seed)
            todo = [mode for mode in chosen.modes if (kind, float(strength), mode, seed) not in done]
            strong = label_miou(pictures, noisy) if todo else 0.0
            for mode in todo:
                options = TrainingOptions(
                    chosen.iterations,
                    chosen.batch,
                    crop=64,
                    scale_jitter=(0.9, 1.1),
                    colour_jitter=0.1,
                    learning_rate=2e-3,
                    weight_decay=1e-4,
                    precision="fp32",
                    workers=0,
                    training_mode=mode,
                    reliable_share=chosen.share,
                )
                network = new_networks(
                    NETWORKS[mode], chosen.segmenter, VOC.classes, seed, initial_network=chosen.initial_network
                )
                start = time.monotonic()
                train(network, noisy, VOC.ignore, options, seed, device, f"{kind} {strength}, {mode}, seed {seed}")
                seconds = time.monotonic() - start
                trained = {mode: (network, seconds)}
                if mode == "ensemble":
                    trained["baseline"] = network.networks[0], seconds / 2
                for name, (one, cost) in trained.items():
                    miou = evaluate(one, validation, VOC, batch_size=32, device=device, bootstrap=2).miou
                    values = (
                        kind,
                        float(strength),
                        name,
                        seed,
                        f"{100 * strong:.1f}",
                        f"{100 * miou:.1f}",
                        round(cost, 1),
                    )
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
                    print(*values, flush=True)
                with atomic_path(manifest) as path:
                    about = {"settings": settings, **provenance(), "started": started, "rows": len(rows)}
                    path.write_text(json.dumps(about, indent=1))
                write_rows(table, rows)
    write_rows(folder / "tables" / "noise.csv", means(rows))
    figure = noise_figure(rows)
    save_figure(figure, folder / "figures" / "noise.png")
    plt.close(figure)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=project_root() / "results")
    parser.add_argument("--kinds", nargs="+", choices=STRENGTHS, default=list(STRENGTHS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...: more seeds may follow in a later call")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=720)
    parser.add_argument("--share", type=float, default=0.5, help="of the pixels that co-training trusts")
    parser.add_argument("--segmenter", default="resunet-resnet10t")
    parser.add_argument("--initial-network", default=START, help="folder of a saved network; '': from scratch")
    chosen = parser.parse_args(arguments)
    study(chosen.out, chosen)


if __name__ == "__main__":
    main()
