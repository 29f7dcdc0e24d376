"""The metric against its definition, second libraries and hand-made cases."""

import csv
import importlib.util
import json
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from diffseg.benchmarks import evaluation
from diffseg.benchmarks.classes import BENCHMARKS, CITYSCAPES, VOC, imagenet_s
from diffseg.benchmarks.evaluation import crf, describe_inference, evaluate, evaluate_folder, score
from diffseg.benchmarks.labels import write_label
from diffseg.benchmarks.metrics import (
    ConfusionMatrix,
    ImageNetSScores,
    bootstrap_interval,
    boundary_map,
    iou_per_class,
    mean_iou,
)
from diffseg.errors import DiffsegError
from diffseg.experiments import agreement
from diffseg.paths import project_root

TINY = imagenet_s("tiny", ["n01", "n02", "n03", "n04"], "Tiny")


def corner_cases(num_classes, ignore, seed, images=4, side=12):
    """Random labels, predictions N x H x W: absent classes, a wholly ignored image, objects of one pixel."""
    random = np.random.default_rng(seed)
    present = random.choice(num_classes, size=max(2, num_classes // 2), replace=False)  # the others are absent
    label = random.choice(present, size=(images, side, side + 3))
    label[:, : side // 2] = present[0]
    prediction = np.where(random.random(label.shape) < 0.6, label, random.choice(present, size=label.shape))
    label[1] = ignore
    label[2] = present[0]
    label[2, 5, 5] = present[-1]
    label[random.random(label.shape) < 0.1] = ignore
    prediction[3, 0, 0] = (present[-1] + 1) % num_classes
    return torch.from_numpy(label), torch.from_numpy(prediction)


def iou_by_definition(label, prediction, num_classes, ignore):
    """Intersection over union of pixel sets, class by class; nan for an empty union."""
    label, prediction = np.asarray(label), np.asarray(prediction)
    iou = []
    for index in range(num_classes):
        truth = (label == index) & (label != ignore)
        guess = (prediction == index) & (label != ignore)
        union = np.logical_or(truth, guess).sum()
        iou.append(np.logical_and(truth, guess).sum() / union if union else math.nan)
    return np.array(iou)


def counted(label, prediction, num_classes, ignore):
    matrix = ConfusionMatrix(num_classes, ignore)
    matrix.update(label, prediction)
    return matrix


seeds = st.integers(0, 10**6)


# Agreement


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_classes=st.integers(2, 21))
def test_iou_is_that_of_the_definition(seed, num_classes):
    label, prediction = corner_cases(num_classes, 255, seed)
    matrix = counted(label, prediction, num_classes, 255)
    expected = iou_by_definition(label, prediction, num_classes, 255)
    np.testing.assert_allclose(iou_per_class(matrix.class_sums, "voc"), expected, rtol=0, atol=1e-9)
    assert abs(mean_iou(matrix.class_sums, "voc") - np.nanmean(expected)) <= 1e-9
    zero = np.nan_to_num(expected)
    np.testing.assert_allclose(iou_per_class(matrix.class_sums, "imagenet-s"), zero, rtol=0, atol=1e-9)
    assert abs(mean_iou(matrix.class_sums, "imagenet-s") - zero.mean()) <= 1e-9
    valid = label != 255
    assert abs(matrix.pixel_accuracy - (label == prediction)[valid].double().mean()) <= 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_counts_and_scores_are_those_of_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    label, prediction = corner_cases(21, 255, seed)
    metric = classification.MulticlassJaccardIndex(21, average="none", ignore_index=255)
    macro = classification.MulticlassJaccardIndex(21, average="macro", ignore_index=255)
    matrix = ConfusionMatrix(21, 255)
    for truth, guess in zip(label, prediction, strict=True):
        metric.update(guess[None], truth[None])
        macro.update(guess[None], truth[None])
        matrix.update(truth, guess)
    theirs = metric.confmat.numpy()
    np.testing.assert_array_equal(matrix.counts, theirs)
    # torchmetrics divides in float32, so its integer state is divided here in float64, and its own result
    # compared within float32's rounding.
    union = theirs.sum(0) + theirs.sum(1) - theirs.diagonal()
    iou = iou_per_class(matrix.class_sums, "voc")
    np.testing.assert_allclose(iou[union > 0], (theirs.diagonal() / union.clip(1))[union > 0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.nan_to_num(iou), metric.compute(), rtol=0, atol=2e-7)
    assert abs(mean_iou(matrix.class_sums, "voc") - float(macro.compute())) <= 2e-7


def test_the_published_agreement_is_measured_and_below_a_billionth():
    with open(project_root() / "results" / "tables" / "agreement.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["benchmark"] for row in rows} == {"voc", "cityscapes", "imagenet-s-50"}
    assert {row["reference"] for row in rows} == {"definition", "torchmetrics", "cityscapesscripts"}
    assert all(0 <= float(row["largest_difference"]) <= 1e-9 for row in rows)
    assert agreement.compare(VOC, "definition", 3) <= 1e-9
    assert agreement.largest_difference([0.5, math.nan], [0.5, 0.0]) == math.inf, "one that is nan alone is seen"
    assert agreement.largest_difference([0.5, math.nan], [0.25, math.nan]) == 0.25


def test_the_published_metric_costs_less_than_a_tenth_of_the_evaluation():
    report = json.loads((project_root() / "results" / "benchmarks" / "metrics.json").read_text(encoding="utf-8"))
    assert (report["pixels"], report["classes"]) == ([512, 512], 21) and report["rows"]
    for row in report["rows"]:
        extras = row["imagenet_s_extras_ms"]
        counted = row["metric_ms"] + row["bootstrap_ms_of_1449_pictures"] / 1449 + extras
        assert row["metric_share"] < 0.1 and counted < 0.1 * (row["decode_ms"] + row["network_ms"] + counted)


def test_groups_are_the_iou_of_merged_classes():
    label, prediction = corner_cases(19, 255, seed=3)
    matrix = counted(label, prediction, 19, 255)
    for ids in CITYSCAPES.groups.values():
        truth, guess = np.isin(label, ids), np.isin(prediction, ids) & (label != 255).numpy()
        assert abs(matrix.group_iou(ids) - (truth & guess).sum() / (truth | guess).sum()) <= 1e-9
    assert math.isnan(ConfusionMatrix(19, 255).group_iou([11, 12]))


@pytest.mark.slow
def test_cityscapes_scores_are_those_of_its_own_evaluator(tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    truth_paths, guess_paths = [], []
    matrix = ConfusionMatrix(19, 255)
    for seed in range(5):
        for index, (label, prediction) in enumerate(zip(*corner_cases(19, 255, seed, side=40), strict=True)):
            stem = f"city_{seed:06d}_{index:06d}"
            truth_paths.append(str(tmp_path / "gt" / f"{stem}_gtFine_labelIds.png"))
            guess_paths.append(str(tmp_path / "pred" / f"{stem}.png"))
            write_label(truth_paths[-1], label, CITYSCAPES)
            write_label(guess_paths[-1], prediction, CITYSCAPES)
            matrix.update(label, prediction)
    official.args.evalInstLevelScore = False
    official.args.JSONOutput = False
    official.args.quiet = True
    theirs = official.evaluateImgLists(guess_paths, truth_paths, official.args)
    ours = iou_per_class(matrix.class_sums, "cityscapes")
    expected = [theirs["classScores"][name] for name in CITYSCAPES.classes]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
    assert abs(mean_iou(matrix.class_sums, "cityscapes") - theirs["averageScoreClasses"]) <= 1e-9
    for group, category in (("Human", "human"), ("Vehicle", "vehicle")):
        assert abs(matrix.group_iou(CITYSCAPES.groups[group]) - theirs["categoryScores"][category]) <= 1e-9


# The matrix


def test_streaming_batching_and_merging_count_the_same():
    label, prediction = corner_cases(21, 255, seed=1)
    whole = counted(label, prediction, 21, 255)
    parts = [counted(label[i], prediction[i], 21, 255) for i in range(4)]
    parts = pickle.loads(pickle.dumps(parts))  # as they come from other processes
    total = parts[0] + parts[1] + parts[2] + parts[3]
    np.testing.assert_array_equal(total.counts, whole.counts)
    np.testing.assert_array_equal(np.stack(total.per_image), np.stack(whole.per_image))
    np.testing.assert_array_equal(np.stack(whole.per_image).sum(axis=0), whole.class_sums)
    assert whole.counts.dtype == np.int64
    small = counted(label.to(torch.uint8), prediction.to(torch.uint8), 21, 255)  # as decoded, without overflow
    np.testing.assert_array_equal(small.counts, whole.counts)
    with pytest.raises(DiffsegError, match="same classes"):
        _ = whole + ConfusionMatrix(19, 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_the_same():
    label, prediction = corner_cases(21, 255, seed=1)
    on_gpu = counted(label.cuda(), prediction.cuda(), 21, 255)
    np.testing.assert_array_equal(on_gpu.counts, counted(label, prediction, 21, 255).counts)
    scores = {}
    for device in ("cpu", "cuda"):
        extras = ImageNetSScores(21, 255)
        for pair in zip(label.to(device), prediction.to(device), strict=True):
            extras.update(*pair)
        scores[device] = extras.compute()
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=0, nan_ok=True)


def test_no_pixel_is_lost_on_streams_longer_than_floats_can_count():
    """2**53 + 1 pixels: float64 has no such number, nor float32 one of 2**24 + 1."""
    one = torch.tensor([[1]])
    matrix = ConfusionMatrix(2, 255)
    matrix.counts[1, 1] = 2**53
    matrix.update(one, one)
    merged = matrix + counted(one, one, 2, 255)
    assert (matrix.counts[1, 1], merged.counts[1, 1]) == (2**53 + 1, 2**53 + 2)
    assert matrix.class_sums[1].tolist() == [2**53 + 1] * 3
    scores = ImageNetSScores(2, 1000)
    streams = [scores.boundary, scores.bins["L"], scores.boundary_bins["L"]]
    for sums in streams:
        sums[1] = 2**53
    scores.update(one, one)
    again = scores + ImageNetSScores(2, 1000)
    for sums in [*streams, again.boundary, again.bins["L"], again.boundary_bins["L"]]:
        assert sums.dtype == np.int64 and sums[1].tolist() == [2**53 + 1] * 3


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_what_is_predicted_on_ignored_pixels_never_counts(seed):
    label, prediction = corner_cases(21, 255, seed)
    other = prediction.clone()
    other[label == 255] = torch.randint(0, 300, (int((label == 255).sum()),))
    np.testing.assert_array_equal(counted(label, prediction, 21, 255).counts, counted(label, other, 21, 255).counts)


def test_ids_out_of_range_and_other_shapes_raise():
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    for wrong in (21, -1, 254):
        with pytest.raises(DiffsegError, match=f"A label map holds the id {wrong}"):
            counted(torch.full_like(label, wrong), label, 21, 255)
    for wrong in (21, -1, 255):
        with pytest.raises(DiffsegError, match=f"A prediction holds the id {wrong}"):
            counted(label, torch.full_like(label, wrong), 21, 255)
    with pytest.raises(DiffsegError, match="labelIds"):
        counted(torch.full_like(label, 26), label, 19, 255)  # a Cityscapes labelId (car)
    with pytest.raises(DiffsegError, match="\\(1, 4, 5\\).*\\(1, 4, 4\\)"):
        counted(label, torch.zeros(1, 4, 5, dtype=torch.int64), 21, 255)


def test_absent_classes_follow_each_protocol_by_hand():
    label = torch.tensor([[0, 0, 1, 1, 255, 255]])
    prediction = torch.tensor([[0, 1, 1, 1, 2, 3]])
    sums = counted(label, prediction, 4, 255).class_sums
    np.testing.assert_allclose(iou_per_class(sums, "voc"), [1 / 2, 2 / 3, math.nan, math.nan])
    assert mean_iou(sums, "voc") == pytest.approx(7 / 12, abs=1e-12)
    assert mean_iou(sums, "cityscapes") == pytest.approx(7 / 12, abs=1e-12)
    assert mean_iou(sums, "imagenet-s") == pytest.approx(7 / 24, abs=1e-9)


def test_a_split_of_ignored_pixels_only_has_no_score():
    matrix = counted(torch.full((1, 3, 3), 255), torch.zeros(1, 3, 3, dtype=torch.int64), 21, 255)
    assert math.isnan(mean_iou(matrix.class_sums, "voc")) and math.isnan(matrix.pixel_accuracy)
    assert all(math.isnan(bound) for bound in bootstrap_interval(matrix.per_image, "voc", samples=10))


# The interval


def test_bootstrap_is_that_of_images_written_out_several_times():
    label, prediction = corner_cases(5, 255, seed=2, images=6)
    per_image = counted(label, prediction, 5, 255).per_image
    drawn = np.random.default_rng(7).multinomial(6, np.full(6, 1 / 6), size=40)
    mious = []
    for times in drawn:
        chosen = np.repeat(np.arange(6), times)
        mious.append(np.nanmean(iou_by_definition(label[chosen], prediction[chosen], 5, 255)))
    expected = np.quantile(mious, [0.05, 0.95])
    np.testing.assert_allclose(bootstrap_interval(per_image, "voc", samples=40, level=0.9, seed=7), expected)


def test_bootstrap_depends_on_the_seed_only_and_narrows_with_images():
    few = counted(*corner_cases(5, 255, seed=2, images=5), 5, 255)
    assert bootstrap_interval(few.per_image, "voc", seed=1) == bootstrap_interval(few.per_image, "voc", seed=1)
    low, high = bootstrap_interval(few.per_image, "voc")
    assert low < mean_iou(few.class_sums, "voc") < high
    many_low, many_high = bootstrap_interval(few.per_image * 20, "voc")
    assert many_high - many_low < (high - low) / 2
    one = counted(*(tensor[:1] for tensor in corner_cases(5, 255, seed=2)), 5, 255)
    assert bootstrap_interval(one.per_image, "voc") == pytest.approx([mean_iou(one.class_sums, "voc")] * 2)


# ImageNet-S


def boundary_by_erosion(label):
    """The definition, region by region: minus its erosion by d 3x3 squares, with background outside."""
    ndimage = pytest.importorskip("scipy.ndimage")
    label = np.asarray(label)
    steps = max(1, int(round(0.03 * np.sqrt(label.shape[0] ** 2 + label.shape[1] ** 2))))
    edge = np.zeros_like(label)
    for index in np.unique(label):
        region = label == index
        inside = ndimage.binary_erosion(region, np.ones((3, 3)), iterations=steps, border_value=0)
        edge[region & ~inside] = index + 1
    return edge


def imagenet_s_by_definition(labels, predictions, size):
    """The official scores in plain loops over images, bins and ids."""
    limits = {"S": (0, 5), "MS": (5, 25), "ML": (25, 50), "L": (50, 100)}
    edges = np.zeros((size, 3))
    bins = {name: np.zeros((size, 3)) for name in limits}
    edge_bins = {name: np.zeros((size, 3)) for name in limits}
    right, f_measure = 0, 0.0

    def add(sums, truth, guess, shift):
        for index in range(size):
            t, p = truth == index + shift, guess == index + shift
            sums[index] += [(t & p).sum(), t.sum(), p.sum()]

    for label, prediction in zip(labels, predictions, strict=True):
        label, prediction = label.numpy(), prediction.numpy()
        valid = label != 1000
        truth_edge, guess_edge = boundary_by_erosion(label)[valid], boundary_by_erosion(prediction)[valid]
        truth, guess = label[valid], prediction[valid]
        add(edges, truth_edge, guess_edge, 1)
        areas = [(guess == index).sum() for index in range(1, size)]
        if max(areas) > 0 and (truth == 1 + int(np.argmax(areas))).any():
            right += 1
        t, p, hits = (truth > 0).sum(), (guess > 0).sum(), ((truth > 0) & (guess > 0)).sum()
        recall, precision = hits / (t + 1e-20), hits / (p + 1e-20)
        f_measure += 1.3 * precision * recall / (0.3 * precision + recall + 1e-20)
        for name, (above, upto) in limits.items():
            ids = [
                index
                for index in range(1, size)
                if (truth == index).any() and above < math.ceil(100 * (truth == index).sum() / truth.size) <= upto
            ]
            if ids:
                chosen = np.isin(truth, [0, *ids])
                add(bins[name], truth[chosen], guess[chosen], 0)
                add(edge_bins[name], truth_edge[chosen], guess_edge[chosen], 1)

    def iou(sums):
        return sums[:, 0] / (sums[:, 1] + sums[:, 2] - sums[:, 0] + 1e-10)

    scores = {"image_accuracy": right / len(labels), "f_measure": f_measure / len(labels)}
    scores["boundary_miou"] = iou(edges).mean()
    for prefix, all_bins in (("miou", bins), ("boundary_miou", edge_bins)):
        for name, sums in all_bins.items():
            known = sums[:, 1] > 0
            scores[f"{prefix}_{name}"] = iou(sums)[known].mean() if known.any() else math.nan
    return scores


@settings(max_examples=20, deadline=None)
@given(seed=seeds, height=st.integers(1, 50), width=st.integers(1, 50))
def test_boundary_map_is_region_minus_erosion(seed, height, width):
    coarse = np.random.default_rng(seed).choice([0, 1, 7, 919, 1000], size=(1 + height // 9, 1 + width // 9))
    label = np.kron(coarse, np.ones((9, 9), np.int64))[:height, :width]
    np.testing.assert_array_equal(boundary_map(torch.from_numpy(label)), boundary_by_erosion(label) > 0)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_imagenet_s_scores_are_those_of_the_definition(seed):
    labels, predictions = corner_cases(TINY.num_classes, TINY.ignore, seed, images=6, side=20)
    labels[4, :14], predictions[5] = 0, 0
    predictions[0][labels[0] == TINY.ignore] = 1200  # never counted, whatever it is
    scores = ImageNetSScores(TINY.num_classes, TINY.ignore)
    halves = [ImageNetSScores(TINY.num_classes, TINY.ignore) for _ in range(2)]
    for index, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        scores.update(label, prediction)
        halves[index // 3].update(label, prediction)
    expected = imagenet_s_by_definition(labels, predictions, TINY.num_classes)
    assert scores.compute() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert (halves[0] + halves[1]).compute() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_imagenet_s_scores_by_hand():
    label = torch.zeros(10, 10, dtype=torch.int64)
    label[:2] = 1  # 20 of 100 pixels: MS
    label[9, 5:] = 2  # 5 of 100 pixels: S
    prediction = label.clone()
    prediction[:2, 5:] = 0  # half of class 1 missed
    scores = ImageNetSScores(TINY.num_classes, TINY.ignore)
    scores.update(label, prediction)
    result = scores.compute()
    assert result["image_accuracy"] == 1.0
    assert result["f_measure"] == pytest.approx(1.3 * 0.6 / (0.3 + 0.6))  # precision 1, recall 15/25
    assert result["miou_S"] == pytest.approx(1.0)  # background (75 of 75) and class 2
    assert result["miou_MS"] == pytest.approx((75 / 85 + 10 / 20) / 2)
    assert math.isnan(result["miou_ML"]) and math.isnan(result["miou_L"])
    perfect = ImageNetSScores(TINY.num_classes, TINY.ignore)
    perfect.update(label, label)
    assert perfect.compute()["boundary_miou"] == pytest.approx(3 / 5)  # classes 3 and 4 never occur and count 0


def test_the_official_mean_goes_over_every_id_with_background():
    label = torch.tensor([[0, 0, 1, 1000]])
    result = score([(label, torch.tensor([[0, 0, 1, 4]]))], TINY, "by hand", bootstrap=5)
    assert result.miou == pytest.approx(2 / 5, abs=1e-9)
    assert set(result.extras) >= {"image_accuracy", "f_measure", "boundary_miou", "miou_S", "boundary_miou_L"}


# Networks and folders


class Scenes(Dataset):
    """Pictures whose red channel holds the class, so that a network can be written by hand."""

    def __init__(self, benchmark, sizes, seed=0):
        self.samples = []
        random = np.random.default_rng(seed)
        for index, (height, width) in enumerate(sizes):
            coarse = random.integers(0, benchmark.num_classes, (height // 8, width // 8))
            label = torch.from_numpy(np.kron(coarse, np.ones((8, 8), np.int64)))
            image = torch.stack([label, label, label]).to(torch.uint8)
            label[torch.from_numpy(random.random(label.shape) < 0.1)] = benchmark.ignore
            self.samples.append((f"picture_{index}", image, label))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def red_is_the_class(benchmark):
    def predict(images):
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        red = (images[:, 0] * 255).round().long().clamp(0, benchmark.num_classes - 1)
        return 20 * F.one_hot(red, benchmark.num_classes).permute(0, 3, 1, 2).float()

    return predict


def wrong_here_and_there(images):
    """A network that gives label maps, every third column class 1."""
    red = (images[:, 0] * 255).round().long()
    return torch.where((red + torch.arange(red.shape[-1])) % 3 == 0, 1, red)


SIZES = [(32, 48), (32, 48), (48, 32), (40, 40), (32, 48)]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 1), (5, 0)])
def test_a_perfect_network_scores_one_whatever_the_sizes_and_batches(batch_size, workers):
    options = {"batch_size": batch_size, "workers": workers, "bootstrap": 20}
    result = evaluate(red_is_the_class(VOC), Scenes(VOC, SIZES), VOC, **options)
    assert (result.miou, result.pixel_accuracy, result.interval) == (1.0, 1.0, (1.0, 1.0))
    assert (result.images, result.inference, list(result.iou)) == (5, "single scale", list(VOC.classes))


class DecodedSomewhere(Scenes):
    """The name tells which process read the picture."""

    def __getitem__(self, index):
        return (f"{index}-{os.getpid()}", *self.samples[index][1:])


def test_pictures_are_decoded_by_workers_and_predicted_in_batches_of_one_size(tmp_path):
    scenes, seen = DecodedSomewhere(VOC, SIZES), []

    def watching(images):
        seen.append(tuple(images.shape))
        return wrong_here_and_there(images)

    options = {"batch_size": 2, "bootstrap": 20}
    result = evaluate(watching, scenes, VOC, workers=2, write_to=tmp_path, **options)
    assert [shape[0] for shape in seen] == [2, 1, 1, 1], "48 x 32 and 40 x 40 cannot share a batch"
    names = sorted(path.stem.split("-") for path in tmp_path.iterdir())
    assert [index for index, _ in names] == list("01234")
    assert len({pid for _, pid in names}) == 2 and str(os.getpid()) not in {pid for _, pid in names}
    assert result == evaluate(watching, scenes, VOC, **options)


def test_label_maps_and_scores_of_another_resolution_are_taken():
    scenes, network = Scenes(CITYSCAPES, SIZES), red_is_the_class(CITYSCAPES)
    maps = evaluate(lambda images: network(images).argmax(1), scenes, CITYSCAPES, bootstrap=20)
    assert maps.miou == 1.0 and set(maps.groups) == {"Human", "Vehicle"}
    coarse = evaluate(lambda images: F.avg_pool2d(network(images), 4), scenes, CITYSCAPES, bootstrap=20)
    expected = ConfusionMatrix(19, 255)
    for _, image, label in scenes.samples:
        small = F.avg_pool2d(network(image[None] / 255), 4)
        upsampled = F.interpolate(small, size=label.shape, mode="bilinear", align_corners=False)
        expected.update(label[None], upsampled.argmax(1))
    assert coarse.miou == mean_iou(expected.class_sums, "cityscapes") and 0.5 < coarse.miou < 1


def test_views_are_averaged_after_being_put_back():
    scenes, network = Scenes(VOC, SIZES), red_is_the_class(VOC)
    flipped = evaluate(network, scenes, VOC, flip=True, bootstrap=20)
    assert flipped.miou == 1.0 and flipped.inference == "single scale + flip"
    seen = []

    def watching(images):
        seen.append(tuple(images.shape[-2:]))
        return network(images)

    options = {"scales": (0.5, 1.0, 2.0), "flip": True, "bootstrap": 20}
    result = evaluate(watching, Scenes(VOC, SIZES[:1]), VOC, **options)
    assert seen == [(16, 24)] * 2 + [(32, 48)] * 2 + [(64, 96)] * 2
    assert result.inference == "scales 0.5, 1, 2 + flip"
    assert evaluate(network, Scenes(VOC, [(8, 8)] * 4), VOC, **options).miou == 1.0  # one colour a picture


def test_refinement_gets_picture_and_probabilities_and_is_named():
    def to_background(image, probabilities):
        assert image.dtype == torch.uint8 and image.shape[1:] == probabilities.shape[1:]
        assert torch.allclose(probabilities.sum(0), torch.ones(1))
        return torch.eye(21)[0].view(21, 1, 1).expand_as(probabilities)

    result = evaluate(red_is_the_class(VOC), Scenes(VOC, SIZES), VOC, refine=to_background, bootstrap=20)
    assert result.inference == "single scale + to_background"
    assert result.iou["person"] == 0.0 and result.iou["background"] > 0
    assert describe_inference((0.75, 1.25), False, None) == "scales 0.75, 1.25"
    everything = describe_inference([0.75, 1.0, 1.25], True, crf)
    assert everything == "scales 0.75, 1, 1.25 + flip + crf"
    label = torch.zeros(2, 2, dtype=torch.int64)
    assert score([(label, label)], VOC, everything, bootstrap=5).metrics()["inference"] == everything


def test_a_crf_moves_the_prediction_to_the_pictures_edge():
    pytest.importorskip("pydensecrf.densecrf")
    label = torch.zeros(32, 32, dtype=torch.int64)
    label[:, 16:] = 15
    image = torch.where(label > 0, 220, 30).to(torch.uint8).expand(3, -1, -1).contiguous()
    unsure = torch.zeros(1, 21, 32, 32)
    unsure[:, 0, :, :19], unsure[:, 15, :, 19:] = 2.0, 2.0  # the edge is three pixels off
    scenes = [("one", image, label)]
    plain = evaluate(lambda images: unsure, scenes, VOC, bootstrap=5)
    refined = evaluate(lambda images: unsure, scenes, VOC, refine=crf, bootstrap=5)
    assert refined.inference == "single scale + crf" and refined.miou > plain.miou and refined.miou > 0.97


@pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is not None, reason="the package is there")
def test_a_crf_without_its_package_says_so():
    with pytest.raises(DiffsegError, match="pip install pydensecrf2"):
        evaluate(red_is_the_class(VOC), Scenes(VOC, SIZES), VOC, refine=crf)


TWO_PROCESSES = """
import json, sys, test_evaluation as t
from accelerate import PartialState
assert PartialState(cpu=True).num_processes == 2  # without a GPU only one that is told so finds the other
benchmark = t.BENCHMARKS["imagenet-s-50"]
result = t.evaluate(t.wrong_here_and_there, t.Scenes(benchmark, t.SIZES), benchmark, bootstrap=20, device="cpu")
json.dump([result.metrics(), result.confusion.tolist()], open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_shares_of_all_processes_are_the_split(monkeypatch, processes):
    scenes, parts = Scenes(VOC, SIZES), []
    monkeypatch.setattr(evaluation, "merge_processes", lambda counters: parts.append(counters[0]) or counters)
    for index in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=index)
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        evaluate(wrong_here_and_there, scenes, VOC, bootstrap=2)
    whole = ConfusionMatrix(21, 255)
    for _, image, label in scenes.samples:
        whole.update(label, wrong_here_and_there(image[None] / 255)[0])
    np.testing.assert_array_equal([image for part in parts for image in part.per_image], whole.per_image)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path):
    """Five pictures over two processes of torch.distributed (gloo): both have the scores of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / f"{rank}.json")]
        processes.append(subprocess.Popen(command, env=variables, cwd=Path(__file__).parent))
    assert [process.wait(300) for process in processes] == [0, 0]
    benchmark = BENCHMARKS["imagenet-s-50"]
    alone = evaluate(wrong_here_and_there, Scenes(benchmark, SIZES), benchmark, bootstrap=20)
    for rank in range(2):
        metrics, confusion = json.loads((tmp_path / f"{rank}.json").read_text())
        assert confusion == alone.confusion.tolist() and metrics["images"] == 5
        assert metrics == pytest.approx(alone.metrics(), abs=1e-12)


def test_the_confusion_matrix_is_handed_on():
    result = evaluate(wrong_here_and_there, Scenes(VOC, SIZES), VOC, bootstrap=5)
    expected = ConfusionMatrix(21, 255)
    for _, image, label in Scenes(VOC, SIZES).samples:
        expected.update(label[None], wrong_here_and_there(image[None] / 255))
    np.testing.assert_array_equal(result.confusion, expected.counts)
    assert result.confusion.trace() / result.confusion.sum() == result.pixel_accuracy


def test_wrong_networks_get_one_clear_sentence():
    scenes = Scenes(VOC, SIZES)
    with pytest.raises(DiffsegError, match="needs 21 classes"):
        evaluate(red_is_the_class(CITYSCAPES), scenes, VOC)
    with pytest.raises(DiffsegError, match="not its label's"):
        evaluate(lambda images: images[:, 0, ::2, ::2].long(), scenes, VOC)
    with pytest.raises(DiffsegError, match="need scores"):
        evaluate(lambda images: images[:, 0].long(), scenes, VOC, flip=True)


@pytest.mark.parametrize("name", ["voc", "imagenet-s-300", "cityscapes"])
def test_written_predictions_score_what_the_network_scored(tmp_path, name):
    benchmark = BENCHMARKS[name]
    scenes = Scenes(benchmark, SIZES)

    direct = evaluate(wrong_here_and_there, scenes, benchmark, write_to=tmp_path, bootstrap=20)
    again = evaluate_folder(tmp_path, scenes, benchmark, bootstrap=20)
    assert again.inference == "predictions from files"
    assert {**again.metrics(), "inference": ""} == {**direct.metrics(), "inference": ""}
    Image.new("L", (3, 3)).save(tmp_path / "picture_2.png")
    with pytest.raises(DiffsegError, match="picture_2.png"):
        evaluate_folder(tmp_path, scenes, benchmark)
    (tmp_path / "picture_0.png").unlink()
    with pytest.raises(DiffsegError, match="picture_0.png is missing"):
        evaluate_folder(tmp_path, scenes, benchmark)


def test_metrics_are_json_without_nan():
    label = torch.zeros(4, 4, dtype=torch.int64)
    flat = score([(label, label)], CITYSCAPES, "by hand", bootstrap=5).metrics()
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat
    assert (flat["miou"], flat["group/Human"], flat["iou/road"], flat["iou/car"]) == (1.0, None, 1.0, None)
