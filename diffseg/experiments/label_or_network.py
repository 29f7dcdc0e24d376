"""Whom should a pixel believe, its pseudo-label or a network? Both are judged by a reference network.

python -m diffseg.experiments.label_or_network RUN=PAIR [RUN=PAIR ...]
    results/tables/reliability.csv, reliability.json, results/figures/reliability.png and .pdf

Co-training replaces the pseudo-label by a network's answer on the pixels of small margin. That can help only where the
answer is right more often than the label. So each class's pixels of each image are divided into tenths by their rank
(`diffseg.reliability`), and in each the label and the answers are compared with the reference (in the mini world the
oracle, which was trained on ground-truth masks). PAIR is the folder of two baselines trained on RUN's images and masks
(an ensemble of `diffseg.experiments.robust`). A user has no oracle, so the label is also compared with what both
networks say where they agree.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.readers import pictures_set
from diffseg.cotraining import classes_of_images, edge_aware, restricted
from diffseg.experiments.mask_ablation import load_reference
from diffseg.figures import WIDTH, save_figure
from diffseg.files import sha256_file, write_rows, write_text
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import run_folder
from diffseg.paths import project_root
from diffseg.reliability import reliable_pixels
from diffseg.segmenters import WEIGHTS, load_segmenter

TENTHS = 10
LABEL, NETWORK, PAIR, EDGES, ALONE, AGREED = (
    "label",
    "one network",
    "two networks, within the image's classes",
    "the same, along the image's edges",
    "reliable labels along the edges, no network",
    "label, judged by two networks that agree",  # no reference needed
)
OPINIONS = (LABEL, NETWORK, PAIR, EDGES, ALONE, AGREED)
RELIABLE = 0.8  # share of the labels that the answer along the edges sees, as in edge-aware training


def tenths(rank: torch.Tensor) -> torch.Tensor:
    """Return the tenth of its class's margins that each rank (uint8 H x W) lies in: 0 the largest, 9 the smallest."""
    return rank.long() * TENTHS // 256


def edges_alone(
    image: torch.Tensor, label: torch.Tensor, reliable: torch.Tensor, classes: int, background: int | None
) -> torch.Tensor:
    """Return the edge-aware answer (label map int64 H x W) without any network: its place is taken by equal
    probabilities of the image's classes and background. image: float 3 x H x W in 0..1."""
    named = classes_of_images(label[None], classes)
    if background is not None:
        named[:, background] = True
    equal = (named / named.sum()).view(1, classes, 1, 1).expand(-1, -1, *label.shape)
    return edge_aware(equal, image[None], label[None], reliable[None])[0].argmax(dim=0)


@torch.no_grad()
def accuracies(images: Dataset, reference: Callable, networks: Sequence[Callable]) -> list[dict[str, float]]:
    """Return a row per tenth of the margin: tenth, pixels, and the accuracy (0..1) of each of OPINIONS.

    images: items (name, image uint8 3 x H x W, label int64 H x W, reliability uint8 2 x H x W: margin and rank); class
    0 is the background. reference, networks: from images (float B x 3 x H x W, 0..1) to logits B x K x H x W, on this
    machine's device.
    """
    device = PartialState().device
    right = {name: torch.zeros(TENTHS, dtype=torch.int64) for name in OPINIONS}
    asked = {name: torch.zeros(TENTHS, dtype=torch.int64) for name in OPINIONS}
    for _, image, label, (_, rank) in (images[k] for k in range(len(images))):
        batch = image[None].float().to(device) / 255
        truth, where = reference(batch).argmax(dim=1)[0].cpu(), tenths(rank)
        seen = [network(batch).softmax(dim=1).cpu() for network in networks]
        every = label < seen[0].shape[1]  # not the ignored
        first, second = (one.argmax(dim=1)[0] for one in seen)
        named = classes_of_images(label[None], seen[0].shape[1])
        pair = restricted(sum(seen) / 2, named, 0)
        reliable = reliable_pixels(rank, RELIABLE) & every
        edges = edge_aware(pair, batch.cpu(), label[None], reliable[None])
        alone = edges_alone(batch[0].cpu(), label, reliable, pair.shape[1], 0)
        for name, hit, among in (
            (LABEL, label == truth, every),
            (NETWORK, first == truth, every),
            (PAIR, pair.argmax(dim=1)[0] == truth, every),
            (EDGES, edges.argmax(dim=1)[0] == truth, every),
            (ALONE, alone == truth, every),
            (AGREED, label == first, every & (first == second)),
        ):
            right[name] += where[hit & among].bincount(minlength=TENTHS)
            asked[name] += where[among].bincount(minlength=TENTHS)
    return [
        {"tenth": k + 1, "pixels": int(asked[LABEL][k])}
        | {name: round(int(right[name][k]) / max(1, int(asked[name][k])), 4) for name in OPINIONS}
        for k in range(TENTHS)
    ]


def reliability_figure(rows: Sequence[dict]) -> Figure:
    """Draw accuracy over the tenth of the margin: a panel a run, a line an opinion."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = plt.subplots(1, len(runs), figsize=(WIDTH, 2.9), squeeze=False, sharex=True, sharey=True)
    for axis, run in zip(axes[0], runs, strict=True):
        for opinion in dict.fromkeys(row["opinion"] for row in rows):
            found = [row for row in rows if row["run"] == run and row["opinion"] == opinion]
            values = [100 * float(row["accuracy"]) for row in found]
            style = {LABEL: {"color": "black", "linestyle": "--"}, AGREED: {"color": "0.5", "linestyle": ":"}}
            style[ALONE] = {"color": "#CC79A7", "linestyle": "-."}
            named = opinion.replace("the same", "two networks")
            axis.plot([int(row["tenth"]) for row in found], values, label=named, **style.get(opinion, {}))
        axis.set(title=run, xlabel="tenth of the margins (1: largest)", ylim=(None, 101))
    axes[0][0].set_ylabel("right (%)")
    figure.tight_layout(rect=(0, 0, 1, 0.8))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="RUN=PAIR", help="a run of VOC's classes, and a folder of networks")
    parser.add_argument("--reference", default="mini", help="mini, or the folder of a saved network")
    parser.add_argument("--out", type=Path, default=project_root() / "results")
    chosen = parser.parse_args(arguments)
    pairs = {run: Path(folder) for run, _, folder in (text.partition("=") for text in chosen.pairs)}
    device = PartialState().device
    reference = load_reference(chosen.reference, VOC).eval().to(device)
    rows = [
        {"run": run, "tenth": row["tenth"], "pixels": row["pixels"], "opinion": name, "accuracy": row[name]}
        for run, folder in pairs.items()
        for row in accuracies(pictures_set(run_folder(run) / "03_synthesis", VOC), reference,
                              load_segmenter(folder).to(device).networks)
        for name in OPINIONS
    ]  # fmt: skip
    write_rows(chosen.out / "tables" / "reliability.csv", rows)
    networks = {run: sha256_file(folder / WEIGHTS) for run, folder in pairs.items()}
    about = {"reference": chosen.reference, "networks": networks} | provenance()
    write_text(chosen.out / "tables" / "reliability.json", json.dumps(about, indent=1))
    figure = reliability_figure(rows)
    save_figure(figure, chosen.out / "figures" / "reliability.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
