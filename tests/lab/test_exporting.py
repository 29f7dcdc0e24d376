"""The command that exports a run's synthetic set: its sentences, and what it tells of the run."""

import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from diffseg.benchmarks import formats
from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.labels import write_picture_label
from diffseg.lab.cli import main
from diffseg.lab.exporting import FORMATS
from diffseg.lab.manifests import write_manifest


@pytest.fixture
def run(tmp_path):
    """A run whose third step holds one image; its files are listed as the step lists them."""
    folder = tmp_path / "run" / "03_synthesis"
    for name in ("JPEGImages", "SegmentationClass", "Reliability", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(folder / "JPEGImages" / "000000.jpg")
    write_picture_label(folder / "SegmentationClass" / "000000.png", np.full((4, 6), 8), VOC)
    Image.new("L", (6, 4), 51).save(folder / "Reliability" / "000000.png")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("000000\n")
    (folder / "index.csv").write_text('name,prompt,classes,words,seed\n000000,a cat,"[""cat""]","[""tom""]",5\n')
    (folder / "failed.csv").write_text("name,prompt,reason\n000001,a dog,it is blank\n")
    values = {"benchmark": "voc", "class_list": [], "generator": "owner/model", "generator_lora": "", "lora_scale": 1.0}
    content = {
        "step": "03_synthesis",
        "run": "run",
        "key": "0",
        "parameters": values | {"beta": 0.4, "refiner": "pamr"},
    }
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, names, content | {"metrics": {"tuned": True}})
    return tmp_path / "run"


def test_a_run_is_exported_with_what_made_it(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "--format", "yolo", "--out", str(out)]) == 0
    assert "1 images as yolo" in capsys.readouterr().out
    text = (out / "data.yaml").read_text()
    assert "# Generator: owner/model\n# LoRA: tuned in step 2\n" in text and "# Left out: 1 images" in text
    assert yaml.safe_load(text)["names"][7] == "cat"
    assert (out / "labels" / "train" / "000000.txt").read_text().startswith("7 ")


@pytest.mark.parametrize(("scale", "stated"), [(0.0, "none"), (0.5, "tuned in step 2, scale 0.5")])
def test_a_lora_is_stated_as_it_was_used(run, tmp_path, scale, stated):
    manifest = run / "03_synthesis" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"lora_scale": 1.0', f'"lora_scale": {scale}'))
    assert main(["export", str(run), "--format", "yolo", "--out", str(tmp_path / "out")]) == 0
    assert f"# LoRA: {stated}\n" in (tmp_path / "out" / "data.yaml").read_text()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_is_interrupted_leaves_nothing_and_is_made_by_the_same_command(run, tmp_path, capsys, monkeypatch, kind):
    """By a hand, or by a full disk."""
    command, write_text = ["export", str(run), "--format", "yolo", "--out", str(tmp_path / "out")], formats.write_text

    def cut(path, text):
        if path.suffix == ".yaml":
            raise kind
        write_text(path, text)

    monkeypatch.setattr(formats, "write_text", cut)
    assert main(command) == (130 if kind is KeyboardInterrupt else 1)
    error = capsys.readouterr().err
    assert ("starts again" if kind is KeyboardInterrupt else "cannot write to") in error
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(formats, "write_text", write_text)
    assert main(command) == 0 and (tmp_path / "out" / "data.yaml").is_file()


def test_a_file_in_a_folders_place_is_one_sentence(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["export", str(run), "--format", "yolo", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert f"cannot write to {out}" in error and error.count("\n") == 1


@pytest.mark.parametrize("form, package", [("coco", "pycocotools.mask"), ("hf", "datasets")])
def test_a_missing_package_is_one_sentence(run, tmp_path, capsys, monkeypatch, form, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert form in FORMATS and main(["export", str(run), "--format", form, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"pip install 'diffseg[{form}]'" in error and error.count("\n") == 1


def test_what_cannot_be_exported_is_one_sentence(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for source, out, sentence in (
        (str(run), tmp_path / "full", "is not empty"),
        ("no-such-run", tmp_path / "out", "no whole synthetic set"),
        (str(tmp_path), tmp_path / "out", "no whole synthetic set"),
    ):
        assert main(["export", source, "--format", "yolo", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    (run / "03_synthesis" / "SegmentationClass" / "000000.png").unlink()
    assert main(["export", str(run), "--format", "yolo", "--out", str(tmp_path / "out")]) == 1
    assert "000000.png is missing" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--format", "yolo"], ["--onnx", "a.onnx", "--out", "b"], []])
def test_half_a_command_is_refused(run, more, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(run), *more])
    assert "--out" in capsys.readouterr().err


def test_an_onnx_file_needs_a_network(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--onnx", str(tmp_path / "a.onnx")]) == 1
    assert "no usable segmenter" in capsys.readouterr().err
