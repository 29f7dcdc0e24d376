"""The synthetic set in other trainers' formats, read back by the libraries that read them."""

import json

import numpy as np
import pytest
import yaml
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from diffseg.benchmarks.classes import CITYSCAPES, VOC, get_benchmark
from diffseg.benchmarks.formats import outlines, write_coco, write_hf, write_yolo
from diffseg.benchmarks.labels import write_picture_label
from diffseg.prompts import Prompt
from diffseg.synthesis import FAILED, write_lists

ABOUT = {"Generator": "mini", "Made by": "a test"}
MANY = get_benchmark("", [f"thing {k}, none" for k in range(300)])
BENCHMARKS = pytest.mark.parametrize("benchmark", [VOC, CITYSCAPES, MANY], ids=lambda benchmark: benchmark.name)


def blobs(seed: int, ids: list[int], shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Return a label map of ids in several parts with holes, some of which are one pixel large or touch the edge."""
    noise = np.random.default_rng(seed).normal(size=(len(ids), *shape))
    label = np.array(ids)[gaussian_filter(noise, (0, 2, 2)).argmax(axis=0)]
    label[5, 5], label[10:14, 20:24], label[12, 22], label[0, :9] = ids[0], ids[1], ids[0], ids[1]
    return label


@pytest.fixture
def made(tmp_path):
    """Return a function that writes a set of two images and a failed one, and returns its folder and label maps."""

    def make(benchmark):
        folder, found = tmp_path / "set", {}
        last = benchmark.num_classes - 1
        shown = {"000000": [0, 3, benchmark.ignore], "000002": [0, last, 3]}
        for name in ("JPEGImages", "Reliability", "ReliabilityRank", FAILED):
            (folder / name).mkdir(parents=True)
        rows = []
        for index in range(3):
            classes = tuple(benchmark.classes[k] for k in (3, last)[: 1 + index // 2])
            prompt = f"a photo of {classes[-1]}"
            each = len(classes)
            words = {"words": classes, "spans": ((0, 1),) * each, "relations": ("plain",) * each, "depths": (0,) * each}
            rows.append(Prompt(index, prompt, classes, **words, negative="", seed=index + 2**62))
            name = f"{index:06d}"
            if name not in shown:
                (folder / FAILED / f"{name}.txt").write_text("it is blank")
                continue
            found[name] = label = blobs(index, shown[name])
            pixels = np.random.default_rng(index).integers(0, 256, (*label.shape, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            write_picture_label(folder / "SegmentationClass" / f"{name}.png", label, benchmark)
            for place in ("Reliability", "ReliabilityRank"):
                Image.fromarray(pixels[..., 0]).save(folder / place / f"{name}.png")
        write_lists(rows, folder, failed_share=1.0)
        return folder, found

    return make


def without_ignored(label: np.ndarray, benchmark) -> np.ndarray:
    """Return the label map with -1 where a format has no object: the background and ignored pixels."""
    nothing = [benchmark.ignore] + [k for k, name in enumerate(benchmark.classes) if name == "background"]
    return np.where(np.isin(label, nothing), -1, label)


@BENCHMARKS
def test_pycocotools_reads_the_same_masks(made, benchmark, tmp_path):
    reader = pytest.importorskip("pycocotools.coco")
    source, labels = made(benchmark)
    write_coco(source, benchmark, tmp_path / "out", ABOUT)
    coco = reader.COCO(str(tmp_path / "out" / "annotations" / "instances_train.json"))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert list(names.values()) == list(benchmark.foreground) and min(names) == 1
    images = coco.loadImgs(coco.getImgIds())
    assert [image["file_name"] for image in images] == [f"{name}.jpg" for name in labels]
    for image, (name, label) in zip(images, labels.items(), strict=True):
        file = tmp_path / "out" / "images" / image["file_name"]
        assert file.read_bytes() == (source / "JPEGImages" / f"{name}.jpg").read_bytes()
        assert (image["height"], image["width"]) == label.shape and image["prompt"].startswith("a photo of")
        margin, seen = np.asarray(Image.open(source / "Reliability" / f"{name}.png")), np.full(label.shape, -1)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            seen[mask] = benchmark.classes.index(names[annotation["category_id"]])
            assert annotation["area"] == mask.sum()
            assert annotation["reliability"] == pytest.approx(margin[mask].mean() / 255, abs=1e-4)
            x, y, width, height = map(int, annotation["bbox"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
        assert np.array_equal(seen, without_ignored(label, benchmark))


@BENCHMARKS
def test_yolos_polygons_hold_the_same_pixels(made, benchmark, tmp_path):
    """Exactly by the pixels' centres, as Matplotlib sees them; nearly by the area, as Pillow draws it, enlarged."""
    source, labels = made(benchmark)
    write_yolo(source, benchmark, tmp_path / "out", ABOUT)
    listed = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    assert list(listed["names"].values()) == list(benchmark.foreground) and min(listed["names"]) == 0
    assert {path.stem for path in (tmp_path / "out" / listed["train"]).iterdir()} == set(labels)
    for name, label in labels.items():
        height, width = label.shape
        centres = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
        seen, drawn = np.full(label.shape, -1), {}
        for line in (tmp_path / "out" / "labels" / "train" / f"{name}.txt").read_text().splitlines():
            number, *values = line.split()
            corners = np.array(values, float).reshape(-1, 2) * (width, height)
            assert len(corners) >= 3 and 0 <= corners.min() and (corners <= (width, height)).all()
            inside = Outline(corners).contains_points(centres).reshape(label.shape)
            k = benchmark.classes.index(listed["names"][int(number)])
            assert (seen[inside] == -1).all()  # parts do not overlap
            seen[inside] = k
            area = drawn.setdefault(k, Image.new("1", (8 * width, 8 * height)))
            ImageDraw.Draw(area).polygon([tuple(corner) for corner in 8 * corners - 0.5], fill=1)
        expected = without_ignored(label, benchmark)
        assert np.array_equal(seen, expected)
        assert set(drawn) == set(expected[expected >= 0])
        for k, area in drawn.items():
            one, other = np.asarray(area), np.kron(expected == k, np.ones((8, 8), bool))
            assert (one & other).sum() / (one | other).sum() > 0.9, (name, k)


@BENCHMARKS
def test_datasets_reads_the_same_files(made, benchmark, tmp_path):
    datasets = pytest.importorskip("datasets")
    source, labels = made(benchmark)
    write_hf(source, benchmark, tmp_path / "out", ABOUT)
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    names = read.features["classes"].feature.names
    assert names == list(benchmark.classes) and len(read) == len(labels)
    for row, (name, label) in zip(read, labels.items(), strict=True):
        mask = np.asarray(row["mask"]).astype(int)
        ids = mask if mask.ndim == 2 else mask[..., 0] + 256 * mask[..., 1]
        ignored = 255 if benchmark.num_classes <= 255 else 1000
        assert np.array_equal(ids, np.where(label == benchmark.ignore, ignored, label))
        assert np.array_equal(row["image"], Image.open(source / "JPEGImages" / f"{name}.jpg"))
        assert np.array_equal(row["reliability"], Image.open(source / "Reliability" / f"{name}.png"))
        assert row["seed"] == int(name) + 2**62 and row["prompt"] == f"a photo of {names[row['classes'][-1]]}"
        assert row["words"] == [names[k] for k in row["classes"]]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Generator: mini" in card and "Licence" in card and "Images: 2" in card
    assert f"| {benchmark.classes[3]} | 2 |" in card


def test_a_ring_keeps_its_hole_and_a_pixel_its_place():
    mask = np.zeros((4, 5), bool)
    mask[1:4, :3], mask[2, 1] = True, False
    mask[0, 4] = True
    ring, pixel = sorted(outlines(mask), key=len, reverse=True)
    assert not Outline(ring).contains_point((1.5, 2.5)) and Outline(ring).contains_point((0.5, 2.5))
    assert pixel.min(axis=0).tolist() == [4, 0] and pixel.max(axis=0).tolist() == [5, 1]
    assert outlines(np.zeros((4, 5), bool)) == []


def test_the_description_is_json_and_tells_the_generator(made, tmp_path):
    pytest.importorskip("pycocotools")
    source, _ = made(VOC)
    write_coco(source, VOC, tmp_path / "out", ABOUT)
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text(encoding="utf-8"))
    assert content["info"]["description"] == "Generator: mini; Made by: a test"
    assert "licence" in content["licenses"][0]["name"]
