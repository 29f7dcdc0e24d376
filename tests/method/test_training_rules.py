"""What the training passes on: seeds, schedules, options and answers reach the terms that are tested by themselves."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CLASSES, OPTIONS, changed, halves, same, trained

from diffseg import cotraining as terms
from diffseg import training
from diffseg.augmentation import Augmented
from diffseg.reliability import margin_thresholds, trusted_pixels
from diffseg.segmenters import new_networks
from diffseg.training import Learner, answers_of, batches_from, make_optimizer, step_losses, train, update_average


@pytest.fixture
def weight():
    """A network of one weight, 1."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(network.weight)
    return network


def test_another_seed_is_another_start_order_and_augmentation():
    one, other = (Augmented(halves(16), 255, OPTIONS, seed) for seed in (0, 1))
    assert not torch.equal(one.order, other.order) and not torch.equal(one.view(0, 0)[1], other.view(0, 0)[1])
    assert not same(*(new_networks(1, "upernet-swin-mini", CLASSES, seed) for seed in (0, 1)))
    wide = changed(scale_jitter=(0.5, 1.5), iterations=3)  # what is valid depends on the augmentation alone
    starts = [new_networks(1, "upernet-swin-mini", CLASSES, 0) for _ in range(2)]
    valid = [train(start, halves(), 255, wide, seed)["valid"] for seed, start in enumerate(starts)]
    assert valid[0] != valid[1]


def test_an_epoch_has_every_image_in_an_order_of_its_own():
    epochs = Augmented(halves(8), 255, changed(iterations=8)).order.split(8)
    assert all(sorted(epoch.tolist()) == [*range(8)] for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_flips_move_image_and_label_and_colours_change_the_image():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :, :16] = 220
    label = torch.zeros(32, 32, dtype=torch.int64)
    label[:, :16] = 1
    plain = changed(colour_jitter=0.0, scale_jitter=(1.0, 1.0), iterations=16)

    def views(**values):
        augmented = Augmented([("left", image, label)] * 4, 255, dataclasses.replace(plain, **values))
        return [augmented.view(0, k)[1:3] for k in range(16)]

    assert all(torch.equal(seen[0] > 0.5, one == 1) for seen, one in views())
    assert {int(one[0, 0]) for _, one in views()} == {0, 1}
    assert {seen.unique().numel() for seen, _ in views()} == {2}
    for change in ({"colour_jitter": 0.4}, {"blur": 1.0}):
        assert any(seen.unique().numel() > 2 for seen, _ in views(**change))


def test_the_rate_falls_by_the_poly_schedule(weight):
    learner, rates = Learner(weight, changed(iterations=4, learning_rate=0.1), torch.device("cpu")), []
    for _ in range(4):
        learner.learn(weight(torch.ones(1, 1)).sum())
        learner.record({"loss": 0.0})
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * (1 - k / 4) ** 0.9 for k in range(4)])


def test_the_optimizers_have_their_constants(weight):
    sgd = make_optimizer(weight, changed(optimizer="sgd", weight_decay=0.3))
    assert type(sgd) is torch.optim.SGD
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["weight_decay"]) == (0.9, 0.3)
    adam = make_optimizer(weight, changed(weight_decay=0.3))
    assert type(adam) is torch.optim.AdamW and adam.param_groups[0]["weight_decay"] == 0.3


def test_the_average_follows_fast_at_first(weight):
    average = {key: torch.zeros_like(value) for key, value in weight.state_dict().items()}
    update_average(average, weight, 0.9)
    assert average["weight"].item() == pytest.approx(0.1)
    learner, start = Learner(weight, changed(ema=0.999), torch.device("cpu")), weight.weight.detach().clone()
    learner.learn(weight(torch.ones(1, 1)).sum())  # the first decay is a tenth
    assert weight.weight != start
    torch.testing.assert_close(learner.average["weight"], (start + 0.9 * (weight.weight - start)).detach())


def test_each_option_reaches_its_term():
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 2, 4, 4, generator=random) for _ in range(2)]
    answers = [torch.randn(1, 2, 4, 4, generator=random).softmax(dim=1) for _ in range(2)]
    label, trusted = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool)
    trusted[:, :2] = True
    band = torch.zeros_like(trusted)
    band[:, 1] = True

    def first(band=None, answers=None, **values):
        options = changed(**{"training_mode": "cotrain", **values})
        return step_losses(logits, label, trusted, band, answers, options, 255)[0]

    own = logits[0]
    assert first(warmup_pixels="all") == terms.baseline_loss(own, label, 255)
    assert first(warmup_pixels="reliable") == terms.reliable_loss(own, label, trusted, 255)
    banded = terms.reliable_loss(own, label, trusted, 255, band, 0.5)
    assert (
        first(band, warmup_pixels="reliable", band_weight=0.5)
        == banded
        != terms.reliable_loss(own, label, trusted, 255)
    )
    for target, is_soft in (("hard", False), ("soft", True)):
        heard = terms.peer_loss(own, answers[1], label, trusted, 255, is_soft)
        torch.testing.assert_close(
            first(None, answers, peer_target=target), terms.reliable_loss(own, label, trusted, 255) + heard
        )
    assert first(None, answers, peer_target="hard") != first(None, answers, peer_target="soft")
    urn = first(training_mode="urn", uncertain_weight=0.5)
    assert urn == terms.weighted_loss(own, label, trusted, 255, 0.5) != terms.weighted_loss(own, label, trusted, 255)


def test_what_is_pasted_is_not_named(monkeypatch):
    """Every image is background, and class 1 is pasted all over it: the answers may name background alone."""
    seen = []

    def paste_everywhere(networks, images, label, trusted, *rest):
        return images, torch.ones_like(label), trusted, torch.zeros_like(trusted)

    def answers(logits, images, label, trusted, named, *rest):
        seen.append((label, named))
        return answers_of(logits, images, label, trusted, named, *rest)

    monkeypatch.setattr(training, "mix", paste_everywhere)
    monkeypatch.setattr(training, "answers_of", answers)
    empty = [(name, image, 0 * label, reliability) for name, image, label, reliability in halves(margin=True)]
    trained(empty, changed(training_mode="cotrain", iterations=1, warmup=0.0, peer_classes="image", mixing=0.5))
    [(label, named)] = seen
    assert (label == 1).all() and named[:, 0].all() and not named[:, 1].any()


def test_processes_divide_every_batch():
    def part(index: int) -> list[list[int]]:
        options, state = changed(iterations=3), SimpleNamespace(process_index=index, num_processes=2)
        return [
            list(batch) for batch in batches_from(1, Augmented(halves(), 255, options), options, state).batch_sampler
        ]

    assert part(0) == [[4, 6], [8, 10]] and part(1) == [[5, 7], [9, 11]]


def test_urn_trusts_large_margins_and_the_set_has_one_threshold_a_class():
    _, _, label, reliability = halves(margin=True)[0]
    urn = changed(training_mode="urn", urn_powers=(0.5, 0.7, 1.5, 2.0))
    trusted = trusted_pixels(label, reliability, urn)
    assert trusted[[0, 31]].all() and not trusted[[15, 16]].any()  # sure far from the edge
    assert not torch.equal(trusted, trusted_pixels(label, reliability, dataclasses.replace(urn, beta=0.6)))
    pictures = [(name, image, one, more // (k + 1)) for k, (name, image, one, more) in enumerate(halves(margin=True))]
    options = changed(training_mode="cotrain", reliable_rule="set", reliable_share=0.5)
    found = Augmented(pictures, 255, options).thresholds
    assert found == margin_thresholds([(one, more[0]) for _, _, one, more in pictures], 0.5)
