"""The cost of the training modes beside the baseline."""

import json
from pathlib import Path

import pytest

from diffseg.experiments.speed.training import measure
from diffseg.training_options import NETWORKS, TrainingOptions


def test_every_mode_is_timed_beside_the_baseline():
    options = TrainingOptions(2, 2, 32, (0.9, 1.1), 0.1, 2e-3, 1e-4, "fp32", 0)
    rows = measure(options, "deeplabv3plus-resnet18", pictures=4, repetitions=1)
    assert [row["mode"] for row in rows] == list(NETWORKS)
    assert [row["networks"] for row in rows] == list(NETWORKS.values())
    assert rows[0]["ratio_to_baseline"] == 1 and all(row["seconds_an_iteration"] > 0 for row in rows)


def test_published_ratios_are_plausible():
    path = Path(__file__).parents[2] / "results" / "benchmarks" / "training.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    ratio = {row["mode"]: row["ratio_to_baseline"] for row in json.loads(path.read_text())["rows"]}
    assert ratio["baseline"] == 1 and 1.5 < ratio["ensemble"] < 2.5  # two networks of one size
    assert ratio["cotrain"] > ratio["ensemble"] and ratio["urn"] < ratio["ensemble"]
