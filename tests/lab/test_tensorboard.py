"""TensorBoard beside a training: what it shows, and that it changes nothing."""

import dataclasses
import importlib.util

import pytest
import torch
from tiny_training import changed, halves

from diffseg.benchmarks.classes import get_benchmark
from diffseg.errors import DiffsegError
from diffseg.lab.combinations import check_together
from diffseg.segmenters import new_networks
from diffseg.training import train

BENCHMARK = get_benchmark("", ["thing, none"])
OPTIONS = changed(iterations=4, training_batch=2, training_mode="cotrain", warmup=0.5)


def weights(watch=None) -> dict[str, torch.Tensor]:
    network = new_networks(2, "upernet-swin-mini", BENCHMARK.classes, seed=0)
    train(network, halves(4, margin=True), 255, OPTIONS, seed=0, watch=watch)
    return network.state_dict()


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="the extra tensorboard is not installed")
def test_losses_scores_and_predictions_are_shown_and_the_weights_are_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from diffseg.lab.tensorboard import Watcher

    development = halves(2)
    watched = weights(Watcher(tmp_path, 2, development, BENCHMARK, "cpu"))
    plain = weights()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4]
    scores = events.Scalars("development/miou")
    assert [event.step for event in scores] == [2, 4] and all(0 <= event.value <= 1 for event in scores)
    assert {"training/contradicted", "training/disagreement"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("prediction/1")] == [2, 4]


def test_without_the_extra_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr("diffseg.lab.combinations.find_spec", lambda name: None)
    with pytest.raises(DiffsegError, match="`tensorboard_every` is 5 .* pip install tensorboard"):
        check_together({"tensorboard_every": 5}, "own.yaml")
    check_together({"tensorboard_every": 0}, "own.yaml")


def test_train_tells_its_watcher_each_step():
    told = []
    options = dataclasses.replace(OPTIONS, training_mode="baseline", iterations=2)
    network = new_networks(1, "segformer-mini", BENCHMARK.classes, seed=0)
    history = train(
        network, halves(4, margin=True), 255, options, 0, watch=lambda step, _, values: told.append((step, values))
    )
    assert [step for step, _ in told] == [1, 2]
    assert [values["loss"] for _, values in told] == history["loss"]
