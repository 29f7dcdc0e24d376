"""A labelled data set of one's own: as CVAT, labelme and COCO's tools lay it out, and what is refused of it."""

import json
import pickle
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.evaluation import evaluate_folder, predict_labels
from diffseg.benchmarks.labels import write_prediction
from diffseg.benchmarks.readers import open_split
from diffseg.errors import DiffsegError
from diffseg.inference import predict
from diffseg.lab import declarations
from diffseg.lab.batch import run
from diffseg.lab.combinations import check_together
from diffseg.lab.steps import named_files
from diffseg.miniworld.disk import write_benchmarks
from diffseg.segmenters import new_networks

OWN = ["fox, none", "fire engine, none"]
LABEL = np.array([[0, 1, 1, 2], [0, 0, 255, 2], [0, 0, 0, 2]])  # classes of OWN; 255 is ignored
COLOURS = {0: (0, 0, 0), 1: (250, 50, 83), 2: (51, 221, 255), 255: (224, 224, 192)}
# the layout of CVAT's "Segmentation mask 1.1", with its comment line; a label's name is what its annotator chose
LABELMAP = """# label:color_rgb:parts:actions
background:0,0,0::
fire_truck:51,221,255::
fox:250,50,83::
ignored:224,224,192::
"""
MAPPED = {"fire_truck": "fire engine"}


def benchmark(**data_names):
    return get_benchmark("folder", OWN, data_names or MAPPED)


def picture(label: np.ndarray, suffix: str, folder: Path, name: str) -> None:
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", label.shape[::-1], "green").save(path)


def save(values: np.ndarray, folder: Path, name: str, palette: list[int] | None = None) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image.putpalette(palette)
    image.save(path)


def coloured(label: np.ndarray) -> np.ndarray:
    return np.stack([np.vectorize(lambda k, c=c: COLOURS[k][c])(label) for c in range(3)], axis=-1)


def cvat(root: Path, labels: dict[str, np.ndarray], split: str = "default") -> Path:
    """Write what CVAT's export with images holds: names in folders, images of several formats."""
    for number, (name, label) in enumerate(labels.items()):
        picture(label, (".jpg", ".PNG")[number % 2], root / "JPEGImages", name)
        save(coloured(label), root / "SegmentationClass", name)
        save(coloured(label), root / "SegmentationObject", name)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in labels))
    (root / "labelmap.txt").write_text(LABELMAP)
    return root


@pytest.fixture
def exported(tmp_path):
    return cvat(tmp_path / "task", {"day/one": LABEL, "two": LABEL[::-1]})


# VOC's layout


def test_cvats_export_is_read_by_its_colours_whatever_their_order(exported):
    split = pickle.loads(pickle.dumps(open_split(benchmark(), exported, "default")))  # as a loader's workers get it
    assert [name for name, *_ in (split[0], split[1])] == ["day/one", "two"]
    assert np.array_equal(split[0][2], LABEL) and np.array_equal(split[1][2], LABEL[::-1])
    assert split[0][1].shape == (3, 3, 4)


def test_a_palette_image_of_cvat_counts_by_its_colours_and_one_channel_by_its_lines(exported):
    palette = [value for number in range(3) for value in COLOURS[number]]
    save(np.where(LABEL == 255, 0, LABEL), exported / "SegmentationClass", "two", palette)
    lines = np.select([LABEL == 1, LABEL == 2, LABEL == 255], [2, 1, 3])  # background, fire_truck, fox, ignored
    save(lines, exported / "SegmentationClass", "day/one")
    split = open_split(benchmark(), exported, "default")
    assert np.array_equal(split[1][2], np.where(LABEL == 255, 0, LABEL))
    assert np.array_equal(split[0][2], LABEL)


def test_an_image_without_objects_has_no_label_image_in_cvats_export(exported, capsys):
    label = exported / "SegmentationClass" / "two.png"
    label.unlink()
    split = open_split(benchmark(), exported, "default")
    assert "1 of 2 images of the split default have no label image: all background" in capsys.readouterr().out
    assert np.array_equal(split[0][2], LABEL) and split[1][1].shape[1:] == split[1][2].shape and not split[1][2].any()
    (exported / "SegmentationClass" / "day" / "one.png").unlink()  # none at all is no such export
    with pytest.raises(DiffsegError, match="2 images or labels .*one.png"):
        open_split(benchmark(), exported, "default")


def test_a_label_image_may_be_called_PNG(exported, capsys):
    label = exported / "SegmentationClass" / "two.png"
    label.rename(label.with_suffix(".PNG"))
    assert np.array_equal(open_split(benchmark(), exported, "default")[1][2], LABEL[::-1])
    assert "background" not in capsys.readouterr().out


def test_old_labelmes_label_images_lie_beside_its_arrays(tmp_path):
    cvat(tmp_path, {"one": LABEL})
    (tmp_path / "labelmap.txt").unlink()
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassPNG")
    save(LABEL, tmp_path / "SegmentationClassPNG", "one")
    (tmp_path / "SegmentationClass").mkdir()
    assert np.array_equal(open_split(get_benchmark("folder", OWN), tmp_path, "default")[0][2], LABEL)


def test_the_score_is_of_what_predict_would_write(tmp_path):
    """Whatever an image's size, the network sees it at the side of its training."""
    network = new_networks(1, "resunet-resnet10t", ("background", *(word.split(",")[0] for word in OWN)), 0).eval()
    network.side, seen = 32, []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    shown = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        label = predict_labels(network, shown, benchmark())[0].numpy()
        assert np.array_equal(label, predict(network, Image.fromarray(image))[0])
        predict_labels(network, shown, benchmark(), scales=(2.0,))
        predict_labels(network, shown, replace(benchmark(), protocol="voc"))
        predict_labels(network, shown, replace(benchmark(), protocol="imagenet-s"))  # its files have any size, too
    assert seen[0] == seen[1] == seen[4] and min(seen[0]) == 32 and min(seen[2]) == 64 and seen[3] == (90, 120)


def test_labelmes_export_is_read_by_its_class_names(tmp_path):
    names = ["__ignore__", "_background_", "sky", "fire engine", "fox"]  # its lists begin with -1, its files with 0
    cvat(tmp_path, {"one": LABEL})
    (tmp_path / "labelmap.txt").unlink()
    (tmp_path / "class_names.txt").write_text("\n".join(names[1:]))
    save(np.select([LABEL == 1, LABEL == 2, LABEL == 255], [3, 2, 255]), tmp_path / "SegmentationClass", "one")
    split = open_split(get_benchmark("folder", OWN), tmp_path, "default")
    assert np.array_equal(split[0][2], LABEL)
    (tmp_path / "class_names.txt").write_text("\n".join(["_background_", "sky", "fire engine", "fox"]))
    label = np.array([[0, 1, 2, 3]])
    picture(label, ".jpg", tmp_path / "JPEGImages", "one")
    save(label, tmp_path / "SegmentationClass", "one")
    read = open_split(get_benchmark("folder", OWN), tmp_path, "default")[0][2]
    assert read.tolist() == [[0, 0, 2, 1]]  # a name that is no class is background
    read = open_split(benchmark(sky="ignored"), tmp_path, "default")[0][2]
    assert read.tolist() == [[0, 255, 2, 1]]


def test_without_names_the_values_are_those_of_the_class_list_and_two_names_may_be_one_class(tmp_path):
    cvat(tmp_path, {"one": LABEL})
    save(LABEL, tmp_path / "SegmentationClass", "one")
    both = get_benchmark("folder", ["vehicle, none"], {"fire_truck": "vehicle", "fox": "vehicle"})
    assert np.array_equal(open_split(benchmark(), cvat(tmp_path / "b", {"one": LABEL}), "default")[0][2], LABEL)
    assert set(np.unique(open_split(both, tmp_path / "b", "default")[0][2])) == {0, 1, 255}
    (tmp_path / "labelmap.txt").unlink()
    assert np.array_equal(open_split(get_benchmark("folder", OWN), tmp_path, "default")[0][2], LABEL)


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_a_letter_with_an_accent_is_one_however_it_is_spelt(tmp_path, disk):
    name = unicodedata.normalize(disk, "é")
    picture(LABEL, ".jpg", tmp_path / "JPEGImages", name)
    save(LABEL, tmp_path / "SegmentationClass", name)
    split = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    split.parent.mkdir(parents=True)
    for listed in ("NFC", "NFD"):
        split.write_text(unicodedata.normalize(listed, "é"))
        (found, _, label), *_ = open_split(get_benchmark("folder", OWN), tmp_path, "val")
        assert found == "é" and np.array_equal(label, LABEL)


def test_mini_voc_as_a_folder_of_ones_own_is_mini_voc(tmp_path):
    write_benchmarks(data := tmp_path / "data", {"version": 0, "seed": 0, "voc": {"train": 3, "val": 4}})
    voc = get_benchmark("voc")
    own = get_benchmark("folder", [f"{name}, none" for name in voc.foreground])
    official = open_split(voc, data, "val")
    for mine, theirs in zip(open_split(own, data / voc.folder, "val"), official, strict=True):
        assert mine[0] == theirs[0] and all(map(np.array_equal, mine[1:], theirs[1:]))


def test_predictions_on_it_are_written_and_scored(exported, tmp_path):
    bench = benchmark()
    split = open_split(bench, exported, "default")
    for name, _, label in split:
        write_prediction(tmp_path / "p", name, np.where(label == 255, 0, label), bench, tuple(label.shape))
    found = evaluate_folder(tmp_path / "p", split, bench, bootstrap=10)
    assert found.miou == 1 and found.iou == {"background": 1, "fox": 1, "fire engine": 1} and found.images == 2


# COCO's


def coco(root: Path, split: str = "val") -> Path:
    """Two images of 20 x 30: polygons that overlap, of one class and of two, a crowd in RLE, one that is no class."""
    for name in ("one.jpg", "far/two.png"):
        picture(np.zeros((20, 30)), "", root / "images" / split, name)

    def box(x0, y0, x1, y1):
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    crowd = np.zeros((20, 30), np.uint8)
    crowd[12:, :5] = 1
    edges = np.flatnonzero(np.diff(crowd.flatten(order="F"), prepend=0, append=0))
    counts = np.diff(edges, prepend=0, append=crowd.size).tolist()
    annotations = [
        {"image_id": 7, "category_id": 18, "segmentation": box(2, 2, 12, 10), "iscrowd": 0},
        {"image_id": 7, "category_id": 3, "segmentation": box(8, 6, 20, 16), "iscrowd": 0},
        {"image_id": 7, "category_id": 90, "segmentation": box(21, 0, 30, 5), "iscrowd": 0},
        {"image_id": 7, "category_id": 3, "segmentation": {"counts": counts, "size": [20, 30]}, "iscrowd": 1},
        {"image_id": 7, "category_id": 3, "segmentation": box(10, 4, 24, 18), "iscrowd": 0},
    ]
    content = {
        "images": [
            {"id": 7, "file_name": "one.jpg", "height": 20, "width": 30},
            {"id": 4, "file_name": "far/two.png", "height": 20, "width": 30},
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 3, "name": "fire_truck"},
            {"id": 18, "name": "fox"},
        ],
        "annotations": [entry | {"id": k, "bbox": [0, 0, 1, 1], "area": 1} for k, entry in enumerate(annotations, 1)],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_cocos_json_is_drawn_and_overlaps_of_two_classes_are_ignored(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    split = pickle.loads(pickle.dumps(open_split(benchmark(), coco(tmp_path), "val")))
    assert [name for name, *_ in split.items] == ["one", "far/two"] and not capsys.readouterr().out

    def drawn(x0, y0, x1, y1):  # Pillow fills a polygon with its right and lower edge, COCO without
        image = Image.new("1", (30, 20))
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=1)
        return np.array(image)

    fox, truck = drawn(2, 2, 12, 10), drawn(8, 6, 20, 16) | drawn(10, 4, 24, 18)
    expected = np.select([fox & truck, fox, truck], [255, 1, 2])
    expected[12:, :5] = 2
    assert np.array_equal(split[0][2], expected)
    assert not split[1][2].any() and split[1][1].shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["annotations"][0].update(segmentation=[]), "annotation 1 of .* has no segmentation"),
        (lambda c: c["annotations"][0].update(category_id=5), "uses the category 5, which it does not list"),
        (lambda c: c["annotations"][0].update(category_id=5, id=2), "uses the category 5, which it does not list"),
        (lambda c: c["annotations"][0].update(image_id="7"), "is no COCO JSON of instances .*of the image '7'"),
        (lambda c: c.pop("images"), "is no COCO JSON of instances"),
        (lambda c: c["images"][0].update(file_name="three.jpg"), "1 images or labels .* are missing"),
        (lambda c: c["images"][0].update(file_name="../val/one.jpg"), "outside of the data set"),
        (lambda c: c["images"][0].update(file_name=7), "is no COCO JSON of instances .*no text"),
        (lambda c: c["categories"][0].update(name=None), "is no COCO JSON of instances .*no text"),
        (lambda c: c["images"][0].update(height=21), "annotation 4 of .* cannot be drawn"),
        (lambda c: c["images"][0].update(height=None), "is no COCO JSON of instances .*no size"),
        (lambda c: c["images"][0].update(id=4), "is no COCO JSON of instances .*one id"),
        (lambda c: c.pop("annotations"), "is no COCO JSON of instances .*annotations"),
        # which pycocotools draws as a box of that corner, width and height
        (lambda c: c["annotations"][0].update(segmentation=[[2, 2, 12, 10]]), "annotation 1 of .* three corners"),
    ],
)
def test_a_coco_json_that_does_not_fit_is_named(tmp_path, change, sentence):
    pytest.importorskip("pycocotools")
    path = coco(tmp_path) / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DiffsegError, match=sentence) as error:
        open_split(benchmark(), tmp_path, "val")[0]
    assert "\n" not in str(error.value)


def test_two_images_of_one_name_are_refused_because_one_would_get_the_others_label(tmp_path):
    pytest.importorskip("pycocotools")
    path = coco(tmp_path) / "annotations" / "instances_val.json"
    picture(np.zeros((20, 30)), "", tmp_path / "images" / "val", "one.png")
    path.write_text(path.read_text().replace("far/two.png", "one.png"))
    with pytest.raises(DiffsegError, match="2 images named one "):
        open_split(benchmark(), tmp_path, "val")


# what is refused


def without_a_labelmap_and_a_label(root: Path) -> None:
    """Only CVAT, which writes the labelmap, leaves out label images."""
    (root / "labelmap.txt").unlink()
    (root / "class_names.txt").write_text("background\nfire_truck\nfox\nignored")
    (root / "SegmentationClass" / "two.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / "labelmap.txt").write_text("fox\n"), "holds the line 'fox'"),
        (lambda root: (root / "labelmap.txt").write_text(LABELMAP.replace("51,", "52,")), r"\(51, 221, 255\), which"),
        (lambda root: (root / "labelmap.txt").write_text(LABELMAP.replace("51,221,255", "0,0,0")), "to two names"),
        (lambda root: picture(LABEL, ".jpg", root / "JPEGImages", "two"), "two.jpg would both have the label two.png"),
        (lambda root: (root / "ImageSets/Segmentation/default.txt").write_text("two\n\ntwo"), "2 images named two"),
        (lambda root: (root / "ImageSets/Segmentation/default.txt").unlink(), "there are: none. Write it: the names"),
        (lambda root: (root / "JPEGImages" / "two.PNG").unlink(), "1 images or labels .*two.jpg; export"),
        (without_a_labelmap_and_a_label, "1 images or labels .*two.png; export"),
        (lambda root: save(np.zeros((5, 4, 4)), root / "SegmentationClass", "two"), "two.png is a RGBA image"),
        (lambda root: save(LABEL + 4 * (LABEL == 2), root / "SegmentationClass", "two"), "holds the value 6"),
        (lambda root: (root / "ImageSets/Segmentation/default.txt").write_text(""), "names no image"),
        (lambda root: (root / "ImageSets/Segmentation/default.txt").write_text("../task/two"), "are missing"),
        (lambda root: (root / "SegmentationClass").rename(root / "Masks"), "holds neither SegmentationClass"),
    ],
)
def test_an_export_that_does_not_fit_is_named(exported, spoil, sentence):
    spoil(exported)
    with pytest.raises(DiffsegError, match=sentence) as error:
        open_split(benchmark(), exported, "default")[1]
    assert "\n" not in str(error.value)


def test_names_that_do_not_meet_are_told_with_the_datas_own(exported):
    with pytest.raises(DiffsegError, match="stands for 'fire engine'; it has background, fire_truck, fox, ignored"):
        open_split(get_benchmark("folder", OWN), exported, "default")
    with pytest.raises(DiffsegError, match="maps 'firetruck', but .* has background, fire_truck"):
        open_split(benchmark(firetruck="fire engine"), exported, "default")
    with pytest.raises(DiffsegError, match="maps 'fire_truck' to 'fire'; map it to a class of class_list"):
        open_split(benchmark(fire_truck="fire"), exported, "default")
    with pytest.raises(DiffsegError, match="train.txt is missing; the splits there are: default"):
        open_split(benchmark(), exported, "train")


def test_masks_of_0_and_255_are_refused_because_255_is_ignored(exported):
    (exported / "labelmap.txt").unlink()
    for name in ("day/one", "two"):
        save(255 * (LABEL == 1), exported / "SegmentationClass", name)
    with pytest.raises(DiffsegError, match="0 and 255 only"):
        open_split(get_benchmark("folder", ["fox, none"]), exported, "default")


def test_the_parameters_are_checked_before_anything_is_drawn(exported):
    own = {"benchmark": "folder", "class_list": OWN, "data_root": str(exported), "data_names": MAPPED}
    check_together(own | {"train_real": False, "mix_real": False, "evaluation_split": "default"}, "own.yaml")
    for changes, sentence in [
        ({"class_list": []}, "`class_list` is .* as the benchmark is folder"),
        ({"benchmark": "voc"}, "`data_names` is .* as the benchmark is not folder"),
        ({"evaluation_split": ""}, "val.txt is missing; the splits there are: default"),
        ({"train_real": True}, "train.txt is missing"),
        ({"data_root": str(exported / "no"), "train_real": True}, "there is no data root"),
        ({"data_root": "mini", "train_real": True}, "data_root is mini, .*--only 1-4"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            check_together(own | changes, "own.yaml")
    with pytest.raises(DiffsegError, match="2 images are in both the training split default and the scored"):
        check_together(
            own | {"train_real": True, "training_split": "default", "evaluation_split": "default"}, "own.yaml"
        )
    lists = exported / "ImageSets" / "Segmentation"
    (lists / "other.txt").write_text("two\n")
    two = {"train_real": True, "training_split": "default", "evaluation_split": "other"}
    with pytest.raises(DiffsegError, match="1 images are in both .* default and .* other of .*two.PNG; list"):
        check_together(own | two, "own.yaml")
    check_together(own | two | {"train_real": False}, "own.yaml")
    nothing_is_read = {"data_root": "mini", "train_real": False, "mix_real": False}
    check_together(own | nothing_is_read, "own.yaml")  # as with --only 1-4
    assert declarations.check({"data_names": {"a": "b"}}, {"data_names": {}}, "x") == {"data_names": {"a": "b"}}
    with pytest.raises(DiffsegError, match="data_names"):
        declarations.check({"data_names": {"a": 1}}, {"data_names": {}}, "x")


def test_other_images_of_the_same_names_are_no_overlap(tmp_path):
    """CVAT numbers each task's frames; and VOC's own lists say trainval and test."""
    pytest.importorskip("pycocotools")
    for split in ("train", "val"):
        coco(tmp_path, split)
    own = {"benchmark": "folder", "class_list": OWN, "data_root": str(tmp_path), "data_names": MAPPED}
    own |= {"train_real": True, "training_split": "", "evaluation_split": "val"}
    check_together(own, "own.yaml")
    for old, new in (("train", "trainval"), ("val", "test")):
        (tmp_path / f"annotations/instances_{old}.json").rename(tmp_path / f"annotations/instances_{new}.json")
        (tmp_path / "images" / old).rename(tmp_path / "images" / new)
    check_together(own | {"training_split": "trainval", "evaluation_split": "test"}, "own.yaml")


def test_its_bytes_count_in_the_key(exported):
    before = named_files({"benchmark": "folder", "data_root": str(exported)})["data_root"]
    save(coloured(np.zeros((3, 4), int)), exported / "SegmentationClass", "two")
    after = named_files({"benchmark": "folder", "data_root": str(exported)})["data_root"]
    assert {name for name in after if after[name] != before[name]} == {"SegmentationClass/two.png"}
    assert "data_root" not in named_files({"benchmark": "voc", "data_root": str(exported)})


@pytest.mark.slow
def test_a_run_on_ones_own_labelled_images(tmp_path):
    """Words and labelled images in, a table out: training on both, and the upper bound."""
    write_benchmarks(tmp_path / "data", {"version": 0, "seed": 0, "voc": {"train": 8, "val": 6}})
    classes = get_benchmark("voc").foreground
    names = ("background", *(name.replace("motorbike", "motor_bike") for name in classes))
    root = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    (root / "class_names.txt").write_text("\n".join(names))
    changes = {
        "run": "own",
        "benchmark": "folder",
        "data_root": str(root),
        "class_list": [f"{name}, none" for name in ("car", "cat", "motorbike")],
        "data_names": {"motor_bike": "motorbike"},
        "mix_real": True,
        "images": 12,
        "sampling_steps": 3,
        "iterations": 4,
    }
    made = run("smoke", changes=changes, out=str(tmp_path / "out"))
    summary = json.loads((made / "summary.json").read_text())
    assert summary["benchmark"] == "folder" and summary["validation_images"] == 6 and summary["images_real"] == 8
    assert summary["miou_real"] is not None
