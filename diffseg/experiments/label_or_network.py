"""Whom should a pixel believe, its pseudo-label or the network? Both judged by a reference network.

python -m diffseg.experiments.label_or_network RUN [more runs]     results/tables/reliability.csv, .json, a figure

Co-training replaces the pseudo-label by a network's opinion on the pixels of small margin. That can help only where the
network is right more often than the label. So each class's pixels of each image are divided into tenths by their rank
(`diffseg.reliability`). In each the label and the run's trained network are compared with the reference (in the mini
world the oracle, which was trained on ground-truth masks).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.readers import pictures_set
from diffseg.experiments.mask_ablation import load_reference
from diffseg.figures import WIDTH, save_figure
from diffseg.files import MANIFEST, sha256_file, write_rows, write_text
from diffseg.lab.manifests import read_manifest
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root
from diffseg.segmenters import load_segmenter

TENTHS = 10
REGIONS = ("all pixels", "labelled as objects")


def tenths(rank: torch.Tensor) -> torch.Tensor:
    """Return the tenth of its class's margins that each rank (uint8 H x W) lies in: 0 the largest, 9 the smallest."""
    return rank.long() * TENTHS // 256


@torch.no_grad()
def accuracies(
    pictures: Dataset, reference: Callable, networks: dict[str, Callable]
) -> dict[str, list[dict[str, float]]]:
    """Return, for all pixels and for those labelled as objects, a row per tenth of the margin.

    A row holds tenth, pixels, and the accuracy (0..1) of "label" and of each network. images: items (name, image
    uint8 3 x H x W, label int64 H x W, reliability uint8 2 x H x W: margin and rank). reference, networks: from images
    (float B x 3 x H x W, 0..1) to scores B x K x H x W.
    """
    names = ("pixels", "label", *networks)
    counts = {region: {name: torch.zeros(TENTHS, dtype=torch.int64) for name in names} for region in REGIONS}
    for k in range(len(pictures)):
        _, image, label, (_, rank) = pictures[k]
        batch = image[None].float() / 255
        truth, where = reference(batch).argmax(dim=1)[0], tenths(rank)
        right = {"pixels": torch.ones_like(label, dtype=torch.bool), "label": label == truth}
        right |= {name: network(batch).argmax(dim=1)[0] == truth for name, network in networks.items()}
        for region, counted in zip(REGIONS, (right["pixels"], label > 0), strict=True):
            for name, pixels in right.items():
                counts[region][name] += where[counted & pixels].bincount(minlength=TENTHS)
    return {
        region: [
            {"tenth": k + 1, "pixels": int(found["pixels"][k])}
            | {name: round(int(found[name][k]) / max(1, int(found["pixels"][k])), 4) for name in names[1:]}
            for k in range(TENTHS)
        ]
        for region, found in counts.items()
    }


def reliability_figure(rows: Sequence[dict]) -> Figure:
    """Draw accuracy over the tenth of the margin: a panel for all pixels and one for objects, a line an opinion."""
    regions = list(dict.fromkeys(row["region"] for row in rows))
    figure, axes = plt.subplots(1, len(regions), figsize=(WIDTH, 2.5), squeeze=False, sharex=True)
    for axis, region in zip(axes[0], regions, strict=True):
        for opinion in dict.fromkeys(row["opinion"] for row in rows):
            found = [row for row in rows if row["region"] == region and row["opinion"] == opinion]
            values = [100 * row["accuracy"] for row in found]
            style = {"color": "black", "linestyle": "--"} if opinion == "label" else {}
            axis.plot([row["tenth"] for row in found], values, label=opinion, **style)
        axis.set(title=region, xlabel="tenth of the margins (1: largest)", ylim=(None, 100))
    axes[0][0].set_ylabel("agrees with the oracle (%)")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="their synthetic images must be the same (the first's)")
    parser.add_argument("--reference", default="mini", help="mini, or the folder of a saved network")
    parser.add_argument("--out", type=Path, default=project_root() / "results")
    chosen = parser.parse_args(arguments)
    networks = {}
    for run in chosen.runs:
        used = read_manifest(run / "04_robust_training")["parameters"]
        name = f"{run.name}, {used['training_mode']}, {used['iterations']} iterations"
        networks[name] = load_segmenter(run / "04_robust_training" / "synthetic")
    pictures, reference = pictures_set(chosen.runs[0] / "03_synthesis", VOC), load_reference(chosen.reference, VOC)
    rows = [
        {"region": region, "tenth": row["tenth"], "pixels": row["pixels"], "opinion": name, "accuracy": row[name]}
        for region, found in accuracies(pictures, reference.eval(), networks).items()
        for row in found
        for name in ("label", *networks)
    ]
    write_rows(chosen.out / "tables" / "reliability.csv", rows)
    trained = {run.name: sha256_file(run / "04_robust_training" / MANIFEST) for run in chosen.runs}
    write_text(
        chosen.out / "tables" / "reliability.json",
        json.dumps({"reference": chosen.reference, "runs": trained, **provenance()}, indent=1),
    )
    figure = reliability_figure(rows)
    save_figure(figure, chosen.out / "figures" / "reliability.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
