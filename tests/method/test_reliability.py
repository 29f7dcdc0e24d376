"""Ranks within a class, and what of a pseudo-label is believed, on maps made by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import changed

from diffseg.errors import DiffsegError
from diffseg.reliability import (
    certain_pixels,
    margin_thresholds,
    rank_within_class,
    reliable_pixels,
    trusted_pixels,
)

CAT, DOG = 8, 12


def slow_ranks(label: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Every pixel against every other of its class; equal margins in the order of a shuffle that all images share."""
    place = np.empty(label.size, dtype=int)
    place[torch.randperm(label.size, generator=torch.Generator().manual_seed(0)).numpy()] = np.arange(label.size)
    labels, margins, ranks = label.ravel(), margin.ravel().astype(int), []
    for k in range(label.size):
        others = [j for j in range(label.size) if labels[j] == labels[k]]
        before = sum((-margins[j], place[j]) < (-margins[k], place[k]) for j in others)
        ranks.append(int(np.floor(256 * before / len(others))))
    return np.array(ranks, dtype=np.uint8).reshape(label.shape)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 99))
def test_ranks_and_shares_against_a_loop_over_pixels(height, width, share, seed):
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (height, width), generator=rng, dtype=torch.uint8)
    margin = torch.randint(0, 4, (height, width), generator=rng, dtype=torch.uint8)  # many ties
    rank = rank_within_class(label, margin)
    assert rank.dtype == torch.uint8 and np.array_equal(rank.numpy(), slow_ranks(label.numpy(), margin.numpy()))
    assert torch.equal(rank, rank_within_class(label.long(), margin))  # as it is read back
    reliable = reliable_pixels(rank, share)
    for value in label.unique():
        chosen, left = margin[reliable & (label == value)], margin[~reliable & (label == value)]
        assert len(chosen) >= 1 and abs(len(chosen) - share * int((label == value).sum())) < 1
        assert len(left) == 0 or chosen.min() >= left.max()


def test_reliable_pixels_are_the_best_share_of_each_class():
    label = torch.tensor([[0, 0, 0, 0, CAT, CAT, DOG]], dtype=torch.uint8)
    rank = rank_within_class(label, torch.tensor([[9, 200, 30, 31, 1, 2, 0]], dtype=torch.uint8))
    assert rank.tolist() == [[192, 0, 128, 64, 128, 0, 0]]
    assert reliable_pixels(rank, 0.5).tolist() == [[False, True, False, True, False, True, True]]
    assert reliable_pixels(rank, 1e-6).tolist() == [[False, True, False, False, False, True, True]]
    assert reliable_pixels(rank, 1.0).all() and reliable_pixels(rank, 1).all()
    for share in (0, -0.5, 1.1):
        with pytest.raises(DiffsegError, match="reliable_share is"):
            reliable_pixels(rank, share)


def test_ties_are_scattered_over_the_image():
    rank = rank_within_class(torch.zeros(64, 64, dtype=torch.uint8), torch.full((64, 64), 255).byte())
    reliable = reliable_pixels(rank, 0.5)
    for half in (reliable[:32], reliable[32:], reliable[:, :32], reliable[:, 32:]):
        assert 0.45 < half.float().mean() < 0.55


def test_margin_thresholds_trust_a_share_of_each_class_in_the_set():
    first = torch.tensor([[0, 0, 0, CAT]]), torch.tensor([[9, 8, 7, 1]], dtype=torch.uint8)
    second = torch.tensor([[0, 0, 0, CAT]]), torch.tensor([[1, 2, 2, 50]], dtype=torch.uint8)
    # of six background pixels the best three (above 2), all of the first image; of two cats the second's (above 1)
    assert margin_thresholds([first, second], 0.5) == {0: 3, CAT: 2}
    assert margin_thresholds([first, second, (first[0], None)], 1.0) == {0: 0, CAT: 0}
    # the best margin alone has more pixels than the share: it stays
    assert margin_thresholds([(torch.zeros(1, 4), torch.full((1, 4), 255).byte())], 0.5) == {0: 255}


@pytest.mark.parametrize("beta", [0.2, 0.4])
def test_certainty_follows_from_the_scores_that_made_the_margin(beta):
    """By hand, from scores a of one class: label and margin as masks.py makes them, then URN's rule on a itself."""
    powers = 0.15, 0.2, 0.25, 4, 5, 6
    scores = torch.tensor([[0.0, 0.01, 0.1, 0.25, 0.5, 0.65, 0.8, 0.95]])
    a_bg = (1 - beta - scores).clamp(min=0)
    label = (scores > a_bg).long()
    margin = ((scores - a_bg).abs() * 255).round().to(torch.uint8)
    expected = []
    for a in scores[0].tolist():
        share = sum(a**power > (1 - beta) / 2 for power in powers) / 6
        expected.append(1 - 4 * share * (1 - share) > 0.05)
    assert certain_pixels(label, margin, powers, beta)[0].tolist() == expected
    assert expected[0] and not expected[3] and not expected[4]
    # a class that fills the scale is certain, too
    assert certain_pixels(torch.ones(1, 1), torch.full((1, 1), 255), powers, beta).all()


def test_the_share_of_a_set_ends_at_a_margin_that_occurs_and_includes_it():
    label, margin = torch.zeros(1, 4), torch.tensor([[10, 200, 200, 200]], dtype=torch.uint8)
    assert margin_thresholds([(label, margin)], 0.5) == {0: 200}  # 201 is above all, 10 would trust all
    label, margin = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[9, 10, 20, 21]], dtype=torch.uint8)
    trusted = trusted_pixels(label, torch.stack([margin, margin]), changed(training_mode="cotrain"), {0: 10, 1: 21})
    assert trusted.tolist() == [[False, True, False, True]]


def test_urns_variance_is_that_of_all_responses():
    """A score of 0.25: its powers 0.5 and 0.6 reach 0.4, the others do not; 2 of 6, u = 4 * 2/9, and 1 - u = 0.11."""
    powers = (0.5, 0.6, 0.75, 1.33, 1.67, 2.0)
    assert certain_pixels(torch.zeros(1, 1), torch.full((1, 1), round(255 * 0.3)), powers, 0.2).all()
