"""Every term of the robust losses on hand-made tensors: which pixels count, how much, and where gradients flow."""

import math

import pytest
import torch

from diffseg import cotraining as terms
from diffseg.refiners import pamr

IGNORE = 255


def random_logits(seed: int = 0, size: tuple[int, ...] = (2, 3, 4, 5)) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def pixel_gradients(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Which pixels (bool B x H x W) a loss moves."""
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient.abs().sum(dim=1) > 0


@pytest.fixture
def label() -> torch.Tensor:
    label = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    label[0, 0] = IGNORE
    return label


@pytest.fixture
def reliable() -> torch.Tensor:
    return torch.rand((2, 4, 5), generator=torch.Generator().manual_seed(2)) < 0.5


def test_the_baseline_loss_is_the_mean_over_valid_pixels(label):
    logits = random_logits()
    probabilities = logits.detach().softmax(dim=1)
    by_hand = [
        -math.log(probabilities[b, label[b, y, x], y, x])
        for b in range(2)
        for y in range(4)
        for x in range(5)
        if label[b, y, x] != IGNORE
    ]
    assert len(by_hand) == 35
    loss = terms.baseline_loss(logits, label, IGNORE)
    assert loss.item() == pytest.approx(sum(by_hand) / 35, rel=1e-5)
    assert torch.equal(pixel_gradients(loss, logits), label != IGNORE)


def test_reliable_and_peer_pixels_are_a_partition_of_the_valid_ones(label, reliable):
    logits, peer = random_logits(), random_logits(3)
    own = pixel_gradients(terms.reliable_loss(logits, label, reliable, IGNORE), logits)
    assert torch.equal(own, reliable & (label != IGNORE))
    for is_soft in (False, True):
        other = pixel_gradients(terms.peer_loss(logits, peer.softmax(1), label, reliable, IGNORE, is_soft), logits)
        assert torch.equal(other, ~reliable & (label != IGNORE))


def test_the_peer_teaches_its_argmax_and_gets_no_gradient(label, reliable):
    logits, peer = random_logits(), random_logits(3)
    loss = terms.peer_loss(logits, peer, label, reliable, IGNORE)
    assert torch.autograd.grad(loss, peer, retain_graph=True, allow_unused=True) == (None,)
    taught = (~reliable & (label != IGNORE))[:, None].expand_as(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    # softmax minus one-hot is negative at the target's class alone
    assert torch.equal(
        (gradient < 0) & taught, taught & torch.zeros_like(taught).scatter(1, peer.argmax(1)[:, None], 1)
    )
    # another label on those pixels changes nothing, as long as it is not ignored
    relabelled = torch.where(reliable | (label == IGNORE), label, (label + 1) % 3)
    assert terms.peer_loss(logits, peer, relabelled, reliable, IGNORE).item() == pytest.approx(loss.item())


def test_a_soft_peer_teaches_its_probabilities(label, reliable):
    """The gradient of a cross-entropy to a distribution is softmax minus that distribution, a share of a pixel each."""
    logits, answer = random_logits(), random_logits(3).detach().softmax(dim=1)
    loss = terms.peer_loss(logits, answer, label, reliable, IGNORE, is_soft=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    taught = (~reliable & (label != IGNORE))[:, None]
    expected = (logits.detach().softmax(dim=1) - answer) * taught / (label != IGNORE).sum()
    torch.testing.assert_close(gradient, expected)


def test_the_classes_of_an_image_are_those_of_its_label(label):
    held = terms.classes_of_images(label, 3)
    assert held.tolist() == [[bool((one == k).any()) for k in range(3)] for one in label]
    assert terms.classes_of_images(torch.full((1, 2, 2), IGNORE), 3).tolist() == [[False] * 3]


def test_a_restricted_answer_names_only_the_classes_of_the_image():
    """Background 0.3; dog (1) and cat (2) are named in turn: the mass of other objects goes to the named ones."""
    answer = torch.tensor([0.3, 0.1, 0.2, 0.4]).view(1, 4, 1, 1)

    def over(*named: int, background: int | None = 0) -> list[float]:
        held = torch.zeros(1, 4, dtype=torch.bool)
        held[0, list(named)] = True
        return terms.restricted(answer, held, background).flatten().tolist()

    assert over(0, 1) == pytest.approx([0.3, 0.7, 0, 0])
    assert over(1, 2) == pytest.approx([0.3, 0.7 / 3, 1.4 / 3, 0])  # the background may always be named
    assert over(0) == over() == pytest.approx([1, 0, 0, 0])
    assert over(1, 2, background=None) == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert over(0, 1, 2, 3) == pytest.approx([0.3, 0.1, 0.2, 0.4])


def test_an_edge_aware_answer_is_pamr_of_reliable_labels_and_answers():
    """A dark half and a bright one. The answer says dog (1) one column too far; the second image has cat (2)."""
    images = torch.zeros(2, 3, 32, 32)
    images[..., 16:] = 1
    answer = torch.zeros(2, 4, 32, 32)
    answer[:, 0], answer[0, 1, :, :17], answer[1, 2, :, :17] = 0.4, 0.6, 0.6
    answer[:, 0, :, 17:] = 1
    label = answer.argmax(dim=1)
    reliable = torch.zeros_like(label, dtype=torch.bool)
    reliable[..., 20:] = True
    label[..., 20:] = 0
    label[0, 0, 0] = IGNORE
    scores = torch.where(reliable[:, None], torch.tensor([1.0, 0, 0, 0])[:, None, None], answer)
    refined = terms.edge_aware(answer, images, label, reliable)
    torch.testing.assert_close(refined, pamr(images, scores, dilations=(1, 2)))  # of all classes at once
    assert (answer[:, :, :, 16].argmax(dim=1) > 0).all() and (refined[:, :, :, 16].argmax(dim=1) == 0).all()
    assert (refined[0, :, :, 8].argmax(dim=0) == 1).all() and (refined[1, :, :, 8].argmax(dim=0) == 2).all()


def test_a_pasted_object_is_seen_by_the_edge_aware_answer_of_its_own_image_alone():
    """The first image's answer may name 0 and 1; a reliable object of class 3 is pasted on it. The second has more."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    answer = torch.zeros(2, 6, 16, 16)
    answer[0, :2], answer[1, :5] = 0.5, 0.2
    label = torch.zeros(2, 16, 16, dtype=torch.long)
    label[0, 4:12, 4:12] = 3
    reliable = label == 3
    refined = terms.edge_aware(answer, images, label, reliable)
    torch.testing.assert_close(refined.sum(dim=1), torch.ones(2, 16, 16))
    assert (refined[0, :, 6:10, 6:10].argmax(dim=0) == 3).all() and not refined[0, [2, 4, 5]].any()
    torch.testing.assert_close(terms.edge_aware(answer[:1], images[:1], label[:1], reliable[:1]), refined[:1])
    assert not terms.edge_aware(answer * 0, images, label, reliable & False).any()


def test_the_two_terms_with_a_perfect_peer_are_the_baseline_loss(label, reliable):
    logits = random_logits()
    peer = torch.nn.functional.one_hot(label.masked_fill(label == IGNORE, 0), 3).permute(0, 3, 1, 2).float()
    total = terms.reliable_loss(logits, label, reliable, IGNORE) + terms.peer_loss(
        logits, peer, label, reliable, IGNORE
    )
    assert total.item() == pytest.approx(terms.baseline_loss(logits, label, IGNORE).item(), rel=1e-5)


def test_the_band_weighs_a_fifth_more_where_it_is_reliable():
    """Equal logits, so each of 4 pixels costs log 3: three are reliable, two in the band, one is both."""
    logits, label = torch.zeros(1, 3, 1, 4), torch.zeros(1, 1, 4, dtype=torch.int64)
    reliable = torch.tensor([[[True, True, True, False]]])
    band = torch.tensor([[[True, False, False, True]]])
    loss = terms.reliable_loss(logits, label, reliable, IGNORE, band, 0.2)
    assert loss.item() == pytest.approx((1.2 + 1 + 1) / 4 * math.log(3))


def test_urn_counts_uncertain_pixels_a_twentieth():
    logits, label = torch.zeros(1, 3, 1, 4), torch.tensor([[[0, 1, 2, IGNORE]]])
    certain = torch.tensor([[[True, False, False, True]]])
    loss = terms.weighted_loss(logits, label, certain, IGNORE, 0.05)
    assert loss.item() == pytest.approx((1 + 0.05 + 0.05) / 3 * math.log(3))


def test_empty_and_fully_unreliable_pictures_add_zero(label):
    logits, peer, nothing = random_logits(), random_logits(3), torch.zeros_like(label, dtype=torch.bool)
    ignored = torch.full_like(label, IGNORE)
    for loss in (
        terms.reliable_loss(logits, label, nothing, IGNORE),
        terms.reliable_loss(logits, ignored, ~nothing, IGNORE),
        terms.peer_loss(logits, peer, ignored, nothing, IGNORE),
        terms.weighted_loss(logits, ignored, nothing, IGNORE),
        terms.baseline_loss(logits, ignored, IGNORE),
    ):
        assert loss.item() == 0 and not pixel_gradients(loss, logits).any()


def test_online_labels_need_confidence_of_the_mean():
    """Pixel 0: both sure; 1: they contradict each other; 2: one sure, one not; 3: both sure, but ignored."""
    first = torch.tensor([[9.0, 9, 9, 9], [0, 0, 0, 0]]).view(1, 2, 1, 4)
    second = torch.tensor([[9.0, 0, 1, 9], [0, 9, 0, 0]]).view(1, 2, 1, 4)
    label = torch.tensor([[[1, 0, 0, IGNORE]]])
    online = terms.online_labels([first, second], label, 0.95, IGNORE)
    assert online.tolist() == [[[0, IGNORE, IGNORE, IGNORE]]]
    assert terms.online_labels([first, second], label, 0.8, IGNORE).tolist() == [[[0, IGNORE, 0, IGNORE]]]


def test_half_of_the_foreground_classes_is_chosen():
    online = torch.tensor([[0, 1, 2], [3, 3, IGNORE]])
    seen = set()
    for seed in range(20):
        region = terms.half_of_the_classes(online, 0, IGNORE, torch.Generator().manual_seed(seed))
        chosen = frozenset(online[region].tolist())
        assert len(chosen) == 2 and not chosen & {0, IGNORE}
        assert torch.equal(region, torch.isin(online, torch.tensor(sorted(chosen))))
        seen.add(chosen)
    assert len(seen) == 3
    empty = torch.tensor([[0, IGNORE]])
    assert not terms.half_of_the_classes(empty, 0, IGNORE, torch.Generator()).any()
    # Cityscapes has no background: class 0 is a class as any other
    assert terms.half_of_the_classes(empty, None, IGNORE, torch.Generator()).tolist() == [[True, False]]


def test_the_band_is_two_pixels_wide_at_the_edge():
    region = torch.zeros(1, 7, 7, dtype=torch.bool)
    region[0, 2:5, 2:5] = True
    expected = torch.zeros_like(region)
    expected[0, 1:6, 1:6] = True
    expected[0, 3, 3] = False
    assert torch.equal(terms.boundary_band(region), expected)
    full = torch.ones_like(region)
    assert not terms.boundary_band(full).any() and not terms.boundary_band(~full).any()


def test_what_receives_has_the_networks_labels_and_trust_and_the_rest_its_own():
    """Of two images the first receives a pixel of the second; the networks are sure of that and of a corner."""
    images = torch.stack([torch.zeros(3, 5, 5), torch.ones(3, 5, 5)])
    label, online = torch.zeros(2, 5, 5, dtype=torch.int64), torch.full((2, 5, 5), IGNORE)
    reliable, region = torch.ones(2, 5, 5, dtype=torch.bool), torch.zeros(2, 5, 5, dtype=torch.bool)
    online[0, 0, 0], online[1, 2, 2], region[0, 2, 2] = 5, 7, True
    receives, source = torch.tensor([True, False]), torch.tensor([1, 0])
    mixed, new_label, new_reliable, band = terms.paste(
        images, label, reliable, online, source, region, receives, IGNORE
    )
    assert torch.equal(mixed[0, 0] == 1, region[0]) and band[0].sum() == 9
    expected = torch.zeros(5, 5, dtype=torch.int64)
    expected[0, 0], expected[2, 2] = 5, 7
    assert torch.equal(new_label[0], expected) and torch.equal(new_reliable[0], expected > 0)
    for before, after in zip((images, label, reliable, region), (mixed, new_label, new_reliable, band), strict=True):
        assert torch.equal(before[1], after[1])
    nobody = torch.tensor([False, False])
    same = terms.paste(images, label, reliable, online, source, region & False, nobody, IGNORE)
    for before, after in zip((images, label, reliable, region & False), same, strict=True):
        assert torch.equal(before, after)


def test_neighbours_exchange():
    assert terms.partners(4).tolist() == [1, 0, 3, 2] and terms.partners(3).tolist() == [1, 0, 2]


def test_of_two_classes_one_is_pasted():
    region = terms.half_of_the_classes(torch.tensor([[0, 1, 2]]), 0, 255, torch.Generator().manual_seed(0))
    assert region.sum() == 1


def test_a_soft_answer_hands_no_gradient_to_who_gave_it():
    own, peer = random_logits(0, (1, 2, 2, 2)), random_logits(1, (1, 2, 2, 2))
    label = torch.zeros(1, 2, 2, dtype=torch.int64)
    terms.peer_loss(own, peer.softmax(1), label, label.bool(), 255, is_soft=True).backward()
    assert own.grad is not None and peer.grad is None
