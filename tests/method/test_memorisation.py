"""The test for copies and the rule for the number of steps, on hand-made features."""

import itertools

import pytest
import torch

from diffseg.errors import DiffsegError
from diffseg.memorisation import Memorisation, choose_steps, measure_memorisation, nearest
from diffseg.target_domain import kernel_distance


def sample(count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_nearest_distance_by_hand():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert nearest(a, b).tolist() == [1.0, 4.0]
    assert nearest(a, a).tolist() == [0.0, 0.0]


def test_the_numbers_by_hand():
    tuned, held_out = torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([[4.0], [13.0]])
    drawn = torch.tensor([[1.0], [3.0], [19.0], [26.0]])
    found = measure_memorisation(7, drawn, tuned, held_out)
    assert found.steps == 7 and found.to_tuned == 1.0  # 1, 3, 1, 6: torch's median is the lower middle
    assert found.held_out_to_tuned == 3.0  # 4, 3
    assert found.tuned_share == 0.75  # all but the second, which lies next to 4
    assert found.expected_share == 0.6
    counts = (1, 0, 2, 1, 0)  # drawn pictures next to each real one; one split in ten has all four
    assert sum(sum(three) == 4 for three in itertools.combinations(counts, 3)) == 1
    assert found.limit == 1.0 and not found.copies
    assert found.distance == kernel_distance(drawn, held_out)


def test_fresh_pictures_are_no_copies_and_copies_are_found():
    shares, alarms = [], 0
    for seed in range(40):  # tuned, held-out and drawn pictures of one distribution
        found = measure_memorisation(1, sample(32, 3 * seed), sample(60, 3 * seed + 1), sample(20, 3 * seed + 2))
        shares.append(found.tuned_share)
        alarms += found.copies
    assert sum(shares) / 40 == pytest.approx(0.75, abs=0.04)  # the share that the rule expects
    assert alarms <= 6  # about one in twenty
    tuned, held_out = sample(60, 1), sample(20, 2)
    copied = measure_memorisation(1, tuned[:32] + sample(32, 3, 0.05), tuned, held_out)
    assert copied.copies and copied.tuned_share == 1.0 and copied.to_tuned < 0.2 * copied.held_out_to_tuned


def test_one_picture_that_is_near_to_all_proves_nothing():
    tuned, held_out = torch.eye(60)[:, :6].double(), 5 + sample(20, 2)
    tuned[7] = 0.1
    found = measure_memorisation(1, 0.1 + sample(32, 3, 0.01), tuned, held_out)
    assert found.tuned_share == 1.0 and found.limit == 1.0 and not found.copies


def test_smooth_pictures_are_near_to_all_and_yet_no_copies():
    """Blurred pictures lie in the middle of the domain: near to tuned ones, but as near to held-out ones."""
    tuned, held_out = sample(60, 1), sample(20, 2)
    found = measure_memorisation(1, sample(32, 3, 0.3), tuned, held_out)
    assert found.to_tuned < 0.8 * found.held_out_to_tuned and not found.copies


def row(steps: int, distance: float, share: float, to_tuned: float = 0.9) -> Memorisation:
    return Memorisation(steps, distance, to_tuned, 1.0, share, 0.75, 0.87)


def test_images_that_are_far_from_all_real_ones_are_no_copies():
    assert row(100, 0.5, 0.97).copies and not row(100, 0.5, 0.97, to_tuned=1.0).copies


def test_the_rule_takes_the_nearest_before_copying_begins():
    falling = [row(100, 0.5, 0.7), row(200, 0.3, 0.8), row(300, 0.2, 0.86), row(400, 0.1, 0.95)]
    assert choose_steps(falling) == 300  # 400 is nearer, and copies
    assert choose_steps(falling[::-1]) == 300  # in whatever order
    assert choose_steps([row(100, 0.5, 0.7), row(200, 0.3, 0.8), row(300, 0.4, 0.8)]) == 200  # gone too far
    back = [row(100, 0.5, 0.7), row(200, 0.3, 0.9), row(300, 0.1, 0.8)]
    assert choose_steps(back) == 100  # copying, once begun, is not trusted to end
    assert choose_steps([row(100, 0.5, 0.9), row(200, 0.1, 0.95)]) == 100


def test_too_few_pictures():
    for sizes in ((1, 4, 4), (4, 0, 4), (4, 4, 1)):
        with pytest.raises(DiffsegError, match="too few to tell copies; raise lora_pictures or lora_held_out"):
            measure_memorisation(1, *(sample(size, 0) for size in sizes))
