"""The arms of robust training: what is compared with what, and the interval of a paired difference."""

import json
import math

import pandas as pd
import pytest
import torch
from tiny_training import STEP4, finish_images, recording

from diffseg.benchmarks.classes import VOC
from diffseg.errors import DiffsegError
from diffseg.experiments import robust
from diffseg.experiments.robust import (
    ARMS,
    along_edges,
    arms_figure,
    corrected,
    means,
    parameters_under,
    scores_of,
    voted,
)
from diffseg.files import write_text
from diffseg.lab.parameters import declared
from diffseg.lab.steps import notebook_of
from diffseg.reliability import rank_within_class


def test_a_paired_difference_has_students_interval():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2 degrees of freedom) = 4.3027."""
    scores = {"ensemble": [50, 60, 40], "ensemble, first network": [48, 57, 36], "restricted": [51, 62, 43]}
    rows = [
        {"run": "r", "split": "dev", "arm": arm, "seed": seed, "miou": value}
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]
    table = means(pd.DataFrame(rows)).set_index("arm")
    row = table.loc["restricted"]
    half = 4.3027 / math.sqrt(3)
    assert row.seeds == 3 and row.miou == 52 and row.miou_spread == pytest.approx(9.54, abs=0.01)
    assert row.over_ensemble == 2 and row.over_baseline == 5
    assert (row.over_ensemble_low, row.over_ensemble_high) == pytest.approx((2 - half, 2 + half), abs=0.01)
    assert table.loc["ensemble"].over_ensemble == 0


def test_every_arm_changes_parameters_of_notebook_4():
    known = declared(notebook_of("04_robust_training"))
    for changes in ARMS.values():
        assert changes.keys() <= known.keys()


def test_a_run_without_images_is_one_sentence(tmp_path):
    with pytest.raises(DiffsegError, match="no finished step 3"):
        scores_of({}, tmp_path / "nothing", "nothing", ["ensemble"], 1, "dev", tmp_path)


def test_every_arm_and_seed_is_trained_on_the_runs_images_and_a_second_round_on_its_seeds_first(tmp_path, monkeypatch):
    calls, firsts = recording(monkeypatch, robust), []
    arms = ["ensemble", "baseline, twice as long", "restricted", "second round"]
    rounds = {"second round": lambda images, first, _: firsts.append(first.seed) or ["new"]}
    monkeypatch.setattr(robust, "ROUNDS", rounds)
    finish_images(tmp_path / "r")
    rows = scores_of(STEP4 | {"benchmark": "voc"}, tmp_path / "r", "title", arms, 2, "dev", tmp_path)
    assert [(call.name, call.seed, call.options.iterations) for call in calls] == [
        *(("ensemble", seed, 12) for seed in range(2)),
        *(("baseline, twice as long", seed, 24) for seed in range(2)),
        *(("restricted", seed, 12) for seed in range(2)),
        *((name, seed, 12) for seed in range(2) for name in ("ensemble", "second round")),
    ]
    assert {call.images for call in calls} == {"key of r"} and {call.folder for call in calls} == {tmp_path / "r"}
    ensemble, again, second = calls[0], calls[6], calls[7]
    assert (ensemble.options, ensemble.dataset) == (again.options, again.dataset)  # so it is not trained twice
    assert firsts == [0, 1] and second.dataset == ["new"] and ensemble.dataset[0] == "r 0"
    modes = {call.name: call.options.training_mode for call in calls}
    assert modes == dict(zip(arms, ("ensemble", "baseline", "cotrain", "ensemble"), strict=True))
    assert calls[4].options.reliable_share == ARMS["restricted"]["reliable_share"]
    scores = {(row["arm"], row["seed"]): row["miou"] for row in rows}
    assert scores["ensemble", 1] == 11 and scores["ensemble, first network", 1] == 111  # of the same seed
    assert {(row["run"], row["split"], row["images"]) for row in rows} == {("title", "dev", "key of r")}


def test_rows_of_earlier_calls_stay_but_for_those_of_other_images_or_another_training(tmp_path, monkeypatch):
    def row(run, arm, seed, miou, images):
        return {"run": run, "split": "dev", "arm": arm, "seed": seed, "miou": miou, "images": images}

    pair = "ensemble", "ensemble, first network"
    earlier = [row("r", "BECO", 0, 40.0, "old"), row("r", "BECO", 1, 41.0, "new"), row("s", "BECO", 0, 42.0, "other")]
    for arm in pair:
        earlier += [row("s", arm, 0, 50.0, "other"), row("r", arm, 0, 30.0, "new")]
    made = [row("r", arm, seed, 60.0 + seed, "new") for arm in pair for seed in (0, 1)]
    table = tmp_path / "tables" / "robust_arms_seeds.csv"
    write_text(table, pd.DataFrame(earlier).to_csv(index=False))
    record = {"r": {"parameters": robust.recipe_of({"iterations": 8})}}
    write_text(table.with_name("robust_arms.json"), json.dumps(record))
    for name, value in {
        "scores_of": lambda *_: made,
        "images_key": lambda run: "new",
        "arms_figure": lambda rows: None,
        "save_figure": lambda *_: None,
    }.items():
        monkeypatch.setattr(robust, name, value)

    def call(**parameters) -> dict:
        monkeypatch.setattr(robust, "parameters_under", lambda *_: parameters)
        robust.main(["mini-voc", "--runs", "r", "--arms", "BECO", "--out", str(tmp_path), "--split", "dev"])
        return pd.read_csv(table).set_index(["run", "arm", "seed"]).miou.to_dict()

    expected = {(each["run"], each["arm"], each["seed"]): each["miou"] for each in made}
    expected |= {("s", "BECO", 0): 42} | {("s", arm, 0): 50 for arm in pair}
    assert call(iterations=8) == call(iterations=8) == expected | {("r", "BECO", 1): 41}
    assert call(iterations=9) == expected
    monkeypatch.setattr(robust, "ARMS", robust.ARMS | {"BECO": robust.BECO | {"warmup": 1.0}})
    rows = call(iterations=9)  # an arm that means another training now has no rows of the old one
    assert ("s", "BECO", 0) not in rows and rows["s", "ensemble, first network", 0] == 50


def test_the_figure_has_the_arms_of_one_run_and_two_arms_of_every_run():
    rows = [
        {"run": run, "split": split, "arm": arm, "seed": seed, "miou": 50 + seed * (arm == "restricted")}
        for run, split, arms in (
            ("r", "dev", ("restricted", "BECO")),
            ("s", "dev", ("restricted",)),
            ("r", "val", ("restricted",)),
            ("t", "validation", ("restricted", "edge-aware")),
            ("u", "validation", ("BECO",)),
        )
        for arm in ("ensemble", "ensemble, first network", *arms)
        for seed in range(3)
    ]
    figure = arms_figure(pd.DataFrame(rows))
    axes = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] == ["restricted", "edge-aware"]
    labels = [[text.get_text() for text in axis.get_yticklabels()] for axis in axes]
    assert labels == [["BECO", "restricted"], ["r", "t"]]
    assert axes[0].get_title() == "r, development split"
    validation = pd.DataFrame(rows).query("split == 'val'")
    assert [axis.get_title() for axis in arms_figure(validation).axes] == ["validation"]


def test_a_second_round_corrects_doubtful_pixels_within_the_images_classes():
    """The network sees class 2 everywhere; the image is of class 1, so its doubtful pixels become class 1."""
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:8] = 1
    rank = torch.zeros(16, 16, dtype=torch.uint8)
    rank[6:10] = 255  # both sides of the object's edge
    images = [("one", torch.zeros(3, 16, 16, dtype=torch.uint8), label, torch.stack([rank, rank]))]
    logits = torch.zeros(1, VOC.num_classes, 16, 16)
    logits[:, 2] = 9
    _, image, label = corrected(images, lambda batch: logits, VOC)[0]
    assert image.shape == (3, 16, 16)
    assert (label[:10] == 1).all() and (label[10:] == 0).all()


class Opinion:
    """Two networks that prefer one class everywhere, by a difference of logits."""

    def __init__(self, seen: int, by: float):
        self.seen, self.by, self.networks = seen, by, [self, self]

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(batch), VOC.num_classes, *batch.shape[2:])
        logits[:, 0] = logits[:, self.seen] = 9  # all else is out of the question
        logits[:, self.seen] += self.by
        return logits


def test_without_a_network_doubtful_pixels_follow_the_edges_from_the_reliable_ones():
    """A red object on blue; its mask is two columns too wide, and unsure along its edge."""
    dog, image = VOC.classes.index("dog"), torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[0, :, :8], image[2, :, 8:] = 220, 220
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:, :10] = dog
    label[0, 0] = VOC.ignore
    margin = (torch.arange(16) - 9.5).abs().mul(16).byte().expand(16, 16).contiguous()
    found = along_edges([("one", image, label, torch.stack([margin, rank_within_class(label, margin)]))], VOC)[0][2]
    assert (found[1:, :8] == dog).all() and found[0, 0] == VOC.ignore
    assert (label[:, 8:] == dog).sum() == 32 and (found[:, 8:] == dog).sum() <= 1  # a fifth of 159 is not quite 32


def test_of_two_votes_the_one_that_is_believed_more_wins():
    """In the first tenth the networks agree with 9 of 10 labels, so their slight preference overrules no other;
    in the last tenth they agree with 1 of 10, so a label speaks against its own class."""
    label = torch.ones(20, 10, dtype=torch.int64)
    label[:10, 0], label[10:, 1:] = 0, 0
    label[0, 9] = VOC.ignore
    rank = torch.zeros(20, 10, dtype=torch.uint8)
    rank[10:] = 255
    margin = torch.full_like(rank, 7)  # is not asked
    images = [("one", torch.zeros(3, 20, 10, dtype=torch.uint8), label, torch.stack([margin, rank]))]
    made = voted(images, Opinion(1, by=0.5), VOC)[0][2]
    assert torch.equal(made[:10], label[:10]) and torch.equal(made[10:], 1 - label[10:])
    made = voted(images, Opinion(1, by=9), VOC)[0][2]  # who is certain overrules the first tenth, too
    assert made[0, 9] == VOC.ignore and made.flatten()[:9].eq(1).all() and (made[10:] == 1).all()


def test_what_changes_nothing_is_refused():
    with pytest.raises(DiffsegError, match="--set refiner, reliable_share, seed changes nothing here"):
        parameters_under("mini-voc", ["refiner=none", "reliable_share=0.8", "seed=7", "iterations=8"])
    assert parameters_under("mini-voc", ["iterations=8"])["iterations"] == 8
