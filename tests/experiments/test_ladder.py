"""The ladder from real images to none of the techniques: its training sets, its recipe, its means."""

import argparse
import dataclasses
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import STEP4, finish_images, recording

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.labels import write_picture_label
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.errors import DiffsegError
from diffseg.experiments import ladder
from diffseg.experiments.mask_ablation import load_reference
from diffseg.experiments.paired import options_of
from diffseg.files import read_rows
from diffseg.lab.batch import step_parameters
from diffseg.lab.steps import notebook_of
from diffseg.miniworld.disk import voc_scene
from diffseg.training_options import TrainingOptions

COUNT = 4


@pytest.fixture
def run(tmp_path):
    """A run whose step 3 holds four scenes of mini VOC with empty masks: only a network can know what is there."""
    folder = tmp_path / "run" / "03_synthesis"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    names = [f"{k:06d}" for k in range(COUNT)]
    for k, name in enumerate(names):
        Image.fromarray(voc_scene(0, "ladder", k).image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        write_picture_label(folder / "SegmentationClass" / f"{name}.png", np.zeros((64, 64), np.int64), VOC)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "run"


def test_the_rungs_differ_in_images_or_masks_alone(run):
    images = open_split(VOC, data_folder("mini"), VOC.training_split)
    real, oracle, ours = (ladder.training_set(rung, VOC, run, images) for rung in ("real", "oracle", "ours"))
    assert len(real) == len(oracle) == len(ours) == COUNT
    class_ids = {name: k for k, name in enumerate(VOC.classes)}
    for k in range(COUNT):
        assert torch.equal(oracle[k][1], ours[k][1]) and not ours[k][2].any()
        truth = torch.from_numpy(voc_scene(0, "ladder", k).label(class_ids)).long()
        assert (oracle[k][2] == truth).float().mean() > 0.9
        seen = load_reference("mini", VOC).eval()(oracle[k][1][None].float() / 255)[0].argmax(dim=0)
        assert torch.equal(oracle[k][2], seen)
    assert [name for name, *_ in real] == [f"train_{k * 500:06d}" for k in range(COUNT)]  # spread over 2,000


def test_images_of_an_unfinished_step_3_are_refused(run, monkeypatch):
    monkeypatch.setattr(ladder, "resolve", lambda *_: ({"benchmark": "voc", "data_root": "mini", "run": "run"}, run))
    chosen = argparse.Namespace(run="run", without="", untuned="", rungs=["real"], split="", folder=run)
    with pytest.raises(DiffsegError, match="no finished step 3"):
        ladder.climb(chosen)


def test_the_recipe_is_that_of_step_4():
    parameters = step_parameters(notebook_of("04_robust_training"), {"iterations": 7, "training_precision": "bf16"})
    options = options_of(parameters, "ensemble")
    assert isinstance(options, TrainingOptions) and options.training_mode == "ensemble"
    assert (options.iterations, options.precision) == (7, "bf16")
    same = {field.name for field in dataclasses.fields(options)} & parameters.keys() - {"training_mode", "iterations"}
    assert "crop" in same and "learning_rate" in same
    for name in same:
        value = parameters[name]
        assert getattr(options, name) == (tuple(value) if isinstance(value, list) else value), name


def test_means_and_ratios_are_those_of_each_benchmark_and_split():
    def row(rung, seed, miou, split="val"):
        return {
            "benchmark": "b",
            "split": split,
            "rung": rung,
            "images": 9,
            "mode": "baseline",
            "seed": seed,
            "miou": miou,
        }

    rows = [row(ladder.REAL, 0, "70.0"), row(ladder.REAL, 1, "90.0"), row(ladder.OURS, 0, "60.0")]
    real, ours, alone = ladder.means([*rows, row(ladder.OURS, 0, "50.0", "dev")])
    assert (real["miou"], real["miou_spread"], real["seeds"], real["ratio"]) == ("80.0", "14.1", 2, "1.00")
    assert (ours["miou"], ours["miou_spread"], ours["ratio"]) == ("60.0", "", "0.75")
    assert alone["ratio"] == ""  # its split has no real network
    assert real["ours_gains"] == ours["ours_gains"] == ""  # one seed in common has no interval
    real, ours = ladder.means([*rows, row(ladder.OURS, "1", "70.0")])  # a seed as a file gives it
    # differences -10 and -20: their mean, and Student's t of one degree of freedom, 12.706, times 5
    assert [real[f"ours_gains{side}"] for side in ("", "_low", "_high")] == ["-15.0", "-78.5", "48.5"]


def test_rows_on_images_that_were_drawn_anew_go():
    def row(benchmark, rung, seed=0, images=9):
        return {"benchmark": benchmark, "split": "val", "rung": rung, "seed": seed, "images": images}

    kept = [row(b, rung) for b in ("a", "b") for rung in (ladder.REAL, ladder.ORACLE, ladder.OURS, ladder.WITHOUT)]
    made = [row("a", ladder.OURS)]
    same = ladder.still_true(kept, made, set(), {})
    assert same == [each for each in kept if each not in made]
    assert ladder.still_true(kept, made, {"a"}, {}) == [each for each in same if each != row("a", ladder.ORACLE)]
    more = [row("a", ladder.OURS, "1"), row("a", ladder.REAL, images="20")]  # as a file gives them
    assert ladder.still_true([*kept, *more], made, set(), {}) == [*same, *more]  # a call of fewer seeds removes none
    assert ladder.still_true(more, made, {"a"}, {}) == []  # real images in another number than those drawn anew


def test_each_rung_trains_on_its_own_runs_images(tmp_path, monkeypatch):
    calls, sets, values = (
        recording(monkeypatch, ladder),
        [],
        STEP4 | {"benchmark": "voc", "run": "ours", "data_root": "a/root"},
    )
    monkeypatch.setattr(ladder, "resolve", lambda *_: (values, tmp_path / "ours"))
    monkeypatch.setattr(ladder, "training_parameters", lambda *_: values)
    monkeypatch.setattr(ladder, "training_set", lambda rung, _, run, root: sets.append((rung, run.name)) or [rung])
    for name in ("ours", "plain", "bare"):
        finish_images(tmp_path / name)
    rungs = ["real", "oracle", "robust", "ours", "untuned", "without"]
    chosen = Namespace(run="x", rungs=rungs, without="bare", untuned="plain", split="", seeds=2, folder=tmp_path)
    rows, used, _ = ladder.climb(chosen)
    assert sets == [*((rung, "ours") for rung in rungs[:4]), ("untuned", "plain"), ("without", "bare")]
    assert [(call.name, call.seed) for call in calls] == [(rung, seed) for rung in rungs for seed in (0, 1)]
    assert all(call.images == f"key of {dict(sets)[call.name]}" for call in calls if call.name != "real")
    assert all(call.images == "a/root root 1" for call in calls if call.name == "real")
    assert all(call.dataset == [call.name] for call in calls)
    modes = {call.name: call.options.training_mode for call in calls}
    assert modes == dict.fromkeys(rungs, "baseline") | {"robust": "cotrain"}
    assert used == {name: f"key of {name}" for name in ("ours", "plain", "bare")}
    assert [(row["rung"], row["seed"], row["miou"]) for row in rows[-2:]] == [
        (ladder.WITHOUT, 0, "10.00"),
        (ladder.WITHOUT, 1, "11.00"),
    ]
    assert {(row["split"], row["benchmark"]) for row in rows} == {("validation", "ours")}


def test_a_call_keeps_earlier_rows_until_their_runs_images_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "save_figure", lambda *_: None)

    def call(rung, miou, split="validation", iterations=400, **keys):
        row = dict(zip(ladder.COLUMNS, ("mini", split, rung, 9, "baseline", 0, miou), strict=True))
        monkeypatch.setattr(ladder, "climb", lambda chosen: ([row], keys, {"iterations": iterations}))
        ladder.main(["mini", "--out", str(tmp_path), "--without", "bare", "--untuned", "plain"])
        kept = read_rows(tmp_path / "tables" / "ladder_seeds.csv")
        return {(each["rung"], each["split"]): each["miou"] for each in kept}

    oracle, ours, bare, plain = (
        {(rung, "validation"): miou}
        for rung, miou in ((ladder.ORACLE, "60"), (ladder.OURS, "50"), (ladder.WITHOUT, "20"), (ladder.UNTUNED, "30"))
    )
    assert call(ladder.ORACLE, "60", mini="a") == oracle
    assert call(ladder.OURS, "50", mini="a") == oracle | ours
    assert call(ladder.WITHOUT, "20", bare="a") == oracle | ours | bare
    assert call(ladder.UNTUNED, "30", plain="a") == oracle | ours | bare | plain
    other = {(ladder.WITHOUT, "dev"): "21"}
    assert call(ladder.WITHOUT, "21", "dev", bare="a") == oracle | ours | bare | plain | other
    # of another set of images each: the bare run's row of the other split goes, and then the oracle's
    assert call(ladder.WITHOUT, "21", "dev", bare="b") == oracle | ours | plain | other
    assert call(ladder.OURS, "50", mini="b") == ours | plain | other
    assert call(ladder.OURS, "50", iterations=800, mini="b") == ours  # of another training: no earlier row stays
    record = tmp_path / "tables" / "ladder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"parameters": {}}))
    assert call(ladder.ORACLE, "60", mini="b") == oracle  # nor one whose training is not recorded


def test_merged_classes_have_their_mean_and_gain_where_all_trainings_have_them():
    def row(benchmark, rung, seed, **merged):
        return dict(zip(ladder.COLUMNS, (benchmark, "val", rung, 9, "baseline", seed, "50.0"), strict=True)) | merged

    human = ((ladder.OURS, 0, "20.0"), (ladder.OURS, 1, "21.0"), (ladder.UNTUNED, 0, "8.0"), (ladder.UNTUNED, 1, "9.0"))
    both = [row("c", rung, seed, Human=iou) for rung, seed, iou in human]
    ours, untuned, other = ladder.means([*both, row("b", ladder.OURS, 0, Human="")])
    assert (ours["Human"], ours["Human_ours_gains"]) == ("20.5", "")
    assert [untuned[name] for name in ("Human", "Human_ours_gains", "Human_ours_gains_low")] == ["8.5", "12.0", "12.0"]
    assert other["Human"] == other["Human_ours_gains"] == ""
    *_, untuned = ladder.means([*both, row("c", ladder.UNTUNED, 2)])  # one of before, without merged classes
    assert (untuned["Human"], untuned["Human_ours_gains"], untuned["seeds"]) == ("", "12.0", 3)


def test_the_figure_does_not_mix_splits():
    columns = ("mini", "validation", ladder.REAL, 9, "baseline", 0, "80.0")
    rows = [dict(zip(ladder.COLUMNS, columns, strict=True))]
    rows += [rows[0] | {"split": "dev", "miou": "60.0"}]
    shown = [[text.get_text() for text in ladder.ladder_figure(some).axes[0].texts] for some in (rows, rows[1:])]
    assert shown == [["80.0"], ["60.0"]]
