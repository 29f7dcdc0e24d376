"""Injected label noise: what each kind does to a mask, the margin that stands for its reliability, and the study."""

import pandas as pd
import pytest
import torch

from diffseg.experiments.noise import STRENGTHS, distance_margin, disturb, main, means

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
