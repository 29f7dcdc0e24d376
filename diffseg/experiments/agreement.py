"""How far our scores are from other people's: each protocol against its references on random label maps.

python -m diffseg.experiments.agreement # writes results/tables/agreement.csv

The label maps hold every corner case: absent classes, an image of ignored pixels only, objects of one pixel. The
references are torchmetrics, cityscapesScripts (both in the extra `test`) and numpy from the definition.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffseg.benchmarks.classes import CITYSCAPES, VOC, Benchmark, get_benchmark
from diffseg.benchmarks.evaluation import count, summarise
from diffseg.benchmarks.labels import write_label
from diffseg.files import write_text
from diffseg.paths import project_root

CASES = 100  # sets of label maps for each row; our choice
PICTURES = 4  # in a set
SIDE = 40  # pixels


def random_maps(benchmark: Benchmark, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield PICTURES pairs (label, prediction), int64 SIDE x SIDE: blocks, noise, and the corner cases."""
    random = np.random.default_rng(seed)
    present = random.choice(benchmark.num_classes, max(2, benchmark.num_classes // 2), replace=False)
    for k in range(PICTURES):
        label = np.kron(random.choice(present, (SIDE // 8, SIDE // 8)), np.ones((8, 8), np.int64))
        label[random.integers(SIDE), random.integers(SIDE)] = present[0]  # an object of one pixel
        prediction = np.where(random.random(label.shape) < 0.6, label, random.choice(present, label.shape))
        label[random.random(label.shape) < 0.1] = benchmark.ignore
        if k == 1:
            label[:] = benchmark.ignore
        yield torch.from_numpy(label), torch.from_numpy(prediction)


def iou_by_definition(pairs: list, ids: list[set[int]], ignore: int) -> list[float]:
    """Return intersection over union of pixel sets, for each set of ids; nan for an empty union."""
    iou = []
    for group in ids:
        inside = union = 0
        for label, prediction in pairs:
            valid = label.numpy() != ignore
            truth = np.isin(label.numpy()[valid], list(group))
            guess = np.isin(prediction.numpy()[valid], list(group))
            inside, union = inside + (truth & guess).sum(), union + (truth | guess).sum()
        iou.append(inside / union if union else math.nan)
    return iou


def torchmetrics_iou(pairs: list, benchmark: Benchmark) -> list[float]:
    """Return torchmetrics' IoU per class, from its integer state, as its own division is in float32."""
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(benchmark.num_classes, average="none", ignore_index=benchmark.ignore)
    for label, prediction in pairs:
        metric.update(prediction[None], label[None])
    counts = metric.confmat.double()
    return (counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())).tolist()  # 0 / 0 is nan


def official_cityscapes(pairs: list, folder: Path) -> tuple[list[float], list[float]]:
    """Return class and (human, vehicle) IoU of the official evaluator, which reads labelIds from files."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    paths = []
    for k, (label, prediction) in enumerate(pairs):
        paths.append((str(folder / f"p_0_{k:06d}.png"), str(folder / f"c_0_{k:06d}_gtFine_labelIds.png")))
        write_label(paths[-1][0], prediction, CITYSCAPES)
        write_label(paths[-1][1], label, CITYSCAPES)
    official.args.evalInstLevelScore = official.args.JSONOutput = False
    official.args.quiet = True
    scores = official.evaluateImgLists(*zip(*paths, strict=True), official.args)
    classes = [scores["classScores"][name] for name in CITYSCAPES.classes]
    return classes, [scores["categoryScores"][name] for name in ("human", "vehicle")]


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest |difference|; where only one of two is nan, it is infinite."""
    ours, theirs = np.array(ours), np.array(theirs)
    both = np.isnan(ours) & np.isnan(theirs)
    return float(np.nan_to_num(np.abs(ours - theirs), nan=math.inf)[~both].max(initial=0))


def compare(benchmark: Benchmark, reference: str, cases: int) -> float:
    """Return the largest |difference| of IoU per class, mIoU and groups over `cases` sets of random label maps."""
    largest = 0.0
    for seed in tqdm(range(cases), f"{benchmark.name} against {reference}"):
        pairs = list(random_maps(benchmark, seed))
        result = summarise(count(pairs, benchmark), benchmark, "", bootstrap=1)
        ours, groups = list(result.iou.values()), list(result.groups.values())
        their_groups = iou_by_definition(pairs, [set(ids) for ids in benchmark.groups.values()], benchmark.ignore)
        if reference == "definition":
            theirs = iou_by_definition(pairs, [{k} for k in range(benchmark.num_classes)], benchmark.ignore)
        elif reference == "torchmetrics":
            theirs = torchmetrics_iou(pairs, benchmark)
        else:
            with tempfile.TemporaryDirectory() as folder:
                theirs, their_groups = official_cityscapes(pairs, Path(folder))
        if benchmark.protocol == "imagenet-s":
            theirs = np.nan_to_num(theirs).tolist()  # an id that never occurs counts 0
        theirs = [*theirs, np.nanmean(theirs), *their_groups]
        largest = max(largest, largest_difference([*ours, result.miou, *groups], theirs))
    return largest


def main() -> None:
    pairs = [(get_benchmark("imagenet-s-50"), "definition"), (get_benchmark("imagenet-s-50"), "torchmetrics")]
    pairs += [(benchmark, reference) for benchmark in (VOC, CITYSCAPES) for reference in ("definition", "torchmetrics")]
    pairs.append((CITYSCAPES, "cityscapesscripts"))
    rows = []
    for benchmark, reference in pairs:
        cases = CASES // 10 if reference == "cityscapesscripts" else CASES  # it goes through files
        row = {"benchmark": benchmark.name, "reference": reference, "cases": cases, "pictures": cases * PICTURES}
        rows.append(row | {"largest_difference": f"{compare(benchmark, reference, cases):.1e}"})
    write_text(project_root() / "results" / "tables" / "agreement.csv", pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    main()
