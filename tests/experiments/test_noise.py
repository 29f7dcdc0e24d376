"""Injected label noise: what each kind does to a mask, the margin that stands for its reliability, and the study."""

from argparse import Namespace

import pandas as pd
import pytest
import torch
from tiny_training import STEP4, recording

from diffseg.benchmarks.classes import VOC
from diffseg.experiments import noise
from diffseg.experiments.noise import STRENGTHS, Disturbed, distance_margin, disturb, label_miou, main, means
from diffseg.reliability import rank_within_class

IGNORE = 255


def scene() -> torch.Tensor:
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[4:8, 4:8], label[10:14, 2:6], label[0] = 3, 7, IGNORE
    return label


def test_noise_is_what_it_is_called():
    label = scene()
    grown = disturb(label, "dilation", 2, 0, 21, IGNORE)
    assert (grown[2:10, 2:10] == 3).sum() >= 64 - 12 and (grown[4:8, 4:8] == 3).all()
    assert (grown == 3).sum() <= 64
    # the centre of a shifted object lies where it should, wherever the direction points
    for seed in range(5):
        moved = disturb(label, "shift", 3, seed, 21, IGNORE)
        centre = (moved == 3).nonzero().float().mean(dim=0)
        assert (centre - torch.tensor([5.5, 5.5])).norm() == pytest.approx(3, abs=0.75)
    dropped = disturb(label, "dropped", 1.0, 0, 21, IGNORE)
    assert set(dropped.unique().tolist()) == {0, IGNORE}
    wrong = disturb(label, "wrong class", 1.0, 0, 21, IGNORE)
    assert torch.equal(wrong > 0, label > 0) and not ((wrong == label) & (label > 0) & (label != IGNORE)).any()
    assert 0 < wrong[5, 5] < 21 and 0 < wrong[11, 3] < 21
    for kind in STRENGTHS:
        noisy = disturb(label, kind, 0.5, 0, 21, IGNORE)
        assert (noisy[0] == IGNORE).all() and torch.equal(disturb(label, kind, 0, 0, 21, IGNORE), label)
        assert torch.equal(noisy, disturb(label, kind, 0.5, 0, 21, IGNORE))
    hits = [int(disturb(label, "dropped", 0.3, seed, 21, IGNORE)[5, 5] == 0) for seed in range(300)]
    assert sum(hits) / 300 == pytest.approx(0.3, abs=0.08)


def test_the_margin_of_a_mask_is_the_distance_to_its_edge():
    label = torch.zeros(9, 20, dtype=torch.int64)
    label[:, 10:] = 1
    margin = distance_margin(label, 5)
    left = [255, 255, 255, 255, 255, 204, 153, 102, 51, 0]
    assert margin[4].tolist() == left + left[::-1]
    assert (distance_margin(torch.zeros(4, 4, dtype=torch.int64)) == 255).all()


def test_reliability_knows_the_disturbed_mask_only_and_each_seed_and_image_has_its_own_noise():
    label = scene()
    images = [(name, torch.zeros(3, 16, 16, dtype=torch.uint8), label) for name in "abcd"]
    noisy = Disturbed(images, "shift", 4, 0, VOC)
    masks = torch.stack([mask for _, _, mask, _ in (noisy[k] for k in range(4))])
    for k, name in enumerate("abcd"):
        found, _, mask, (margin, rank) = noisy[k]
        assert found == name and torch.equal(mask, masks[k]) and not torch.equal(mask, label)
        assert torch.equal(margin, distance_margin(mask)) and torch.equal(rank, rank_within_class(mask, margin))
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])
    others = [Disturbed(images, "shift", 4, seed, VOC)[0][2] for seed in range(1, 5)]
    assert any(not torch.equal(masks[0], other) for other in others)
    assert label_miou(images, Disturbed(images, "shift", 0, 0, VOC), VOC) == 100
    truth, known = label.expand_as(masks), label != IGNORE
    pairs = [((truth == k)[:, known], (masks == k)[:, known]) for k in (0, 3, 7)]
    iou = [((seen & true).sum() / (seen | true).sum()).item() for true, seen in pairs]
    assert label_miou(images, noisy, VOC) == pytest.approx(100 * sum(iou) / 3)


def test_every_noise_strength_and_seed_has_networks_of_its_own(tmp_path, monkeypatch):
    calls = recording(monkeypatch, noise)
    monkeypatch.setattr(noise, "label_miou", lambda *_: 80.0)
    chosen = Namespace(folder=tmp_path, split="dev", kinds=["dilation", "dropped"], arms=["restricted"], seeds=2)
    rows = noise.trainings(chosen, STEP4 | {"benchmark": "voc", "run": "mini", "data_root": "a/root"})
    noises = [("none", 0.0), *((kind, strength) for kind in chosen.kinds for strength in STRENGTHS[kind])]
    modes = {"ensemble": "ensemble", "restricted": "cotrain"}
    expected = [(*each, arm, seed) for seed in (0, 1) for each in noises for arm in modes]
    assert [(row["kind"], row["strength"], row["arm"], row["seed"]) for row in rows] == expected
    for call, (kind, strength, arm, seed) in zip(calls, expected, strict=True):
        assert (call.name, call.images, call.seed) == (arm, f"a/root root {kind} {strength} 80.0", seed)
        assert (call.dataset.strength, call.dataset.seed) == (strength, seed) and call.folder == tmp_path / "mini"
        assert call.dataset.kind == kind or strength == 0
        assert call.options.training_mode == modes[arm]


def test_rows_of_an_earlier_call_stay_apart_by_all_that_names_a_training(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "parameters_under", lambda *_: {})
    monkeypatch.setattr(noise, "noise_figure", lambda rows: None)
    monkeypatch.setattr(noise, "save_figure", lambda *_: None)

    def call(scores: dict, *options: str) -> dict:
        fixed = {"kind": "shift", "arm": "ensemble", "label_miou": 80.0}
        rows = [fixed | {"strength": much, "seed": seed, "miou": miou} for (much, seed), miou in scores.items()]
        monkeypatch.setattr(noise, "trainings", lambda *_: rows)
        main(["mini-voc", "--out", str(tmp_path), *options])
        return pd.read_csv(tmp_path / "tables" / "noise_seeds.csv").set_index(["strength", "seed"]).miou.to_dict()

    first = {(2, 0): 50, (2, 1): 51, (4, 0): 52}
    assert call(first) == first
    assert call({(4, 0): 60, (4, 1): 61}) == first | {(4, 0): 60, (4, 1): 61}
    assert call({(4, 0): 70}, "--split", "dev") == {(4, 0): 70}  # other scores: none of the earlier ones stays


def test_gains_are_over_the_ensemble_of_the_same_noise_and_seed():
    rows = [
        {"kind": kind, "strength": 1.0, "arm": arm, "seed": seed, "label_miou": 80.0, "miou": 50 + seed + gain}
        for kind, gains in (("dilation", {"ensemble": 0, "restricted": 3}), ("shift", {"ensemble": 1, "restricted": 0}))
        for arm, gain in gains.items()
        for seed in range(2)
    ]
    table = means(pd.DataFrame(rows)).set_index(["kind", "arm"])
    assert table.over_ensemble.to_dict() == {
        ("dilation", "ensemble"): 0,
        ("dilation", "restricted"): 3,
        ("shift", "ensemble"): 0,
        ("shift", "restricted"): -1,
    }
    assert table.loc[("dilation", "restricted"), "over_ensemble_low"] == 3  # both seeds gain the same


@pytest.mark.slow
def test_the_study_trains_every_arm_once_on_every_noise(tmp_path):
    call = ["mini-voc", "--set", "iterations=1", "--kinds", "dilation", "--arms", "restricted", "--split", "dev"]
    call += ["--seeds", "1", "--out", str(tmp_path / "out"), "--folder", str(tmp_path / "networks")]
    main(call)
    rows = pd.read_csv(tmp_path / "out" / "tables" / "noise_seeds.csv")
    assert set(zip(rows.strength, rows.arm, strict=True)) == {
        (s, a) for s in (0, 2, 4, 6) for a in ("ensemble", "restricted")
    }
    networks = tmp_path / "networks"
    made = {path: path.stat().st_mtime_ns for path in networks.rglob("*.safetensors")}
    main(call)
    assert len(made) == 8 and made == {path: path.stat().st_mtime_ns for path in networks.rglob("*.safetensors")}
    main([*call[:4], "shift", *call[5:]])  # another kind: the rows of the first stay
    both = pd.read_csv(tmp_path / "out" / "tables" / "noise_seeds.csv")
    assert set(both.kind) == {"none", "dilation", "shift"} and len(both) == len(rows) + 6
    assert rows.label_miou[rows.strength == 0].eq(100).all() and rows.label_miou[rows.strength > 0].max() < 90
