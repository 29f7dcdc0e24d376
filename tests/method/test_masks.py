"""Scores to masks and the refiners, on maps made by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffseg.errors import DiffsegError
from diffseg.masks import add_background, class_scores, label_and_margin
from diffseg.refiners import REFINERS, get_refiner, pamr, refiners_at_hand
from diffseg.word_maps import WordMaps

CAT, DOG = 8, 12


def cut(ids, scores, beta=0.2):
    return label_and_margin(ids, add_background(scores, beta))


# --------------------------------------------------------------------------------- scores, label, margin


def test_scores_are_normalised_per_word_and_ordered_by_class():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[0.5, 0.0], [0.25, 0.5]]])
    ids, scores = class_scores(maps, [DOG, CAT], (2, 2))
    assert ids == [CAT, DOG] and scores.dtype == torch.float32
    assert torch.equal(scores[0], torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    assert torch.equal(scores[1], torch.tensor([[0.0, 0.5], [0.25, 1.0]]))


def test_a_class_named_twice_takes_the_larger_score():
    left, right = torch.tensor([[[4.0, 0.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 2.0]]])
    ids, scores = class_scores(torch.cat([left, right]), [CAT, CAT], (1, 3))
    assert ids == [CAT]
    assert torch.equal(scores, torch.tensor([[[1.0, 0.5, 1.0]]]))


def test_scores_have_the_pictures_size():
    maps = torch.tensor([[[0.0, 1.0]]])
    _, scores = class_scores(maps, [CAT], (2, 8))
    assert scores.shape == (1, 2, 8)
    # bilinear: pixel centres at (k + 0.5) / 4 - 0.5 between the two positions
    row = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    assert torch.allclose(scores[0], row.expand(2, 8))


def test_a_map_that_lies_on_the_border_is_turned_round():
    inside = torch.zeros(4, 4)
    inside[1:3, 1:3] = torch.tensor([[4.0, 2.0], [1.0, 3.0]])
    maps = torch.stack([inside, 4 - inside, torch.arange(16.0).view(4, 4)])
    classes = [CAT, DOG, DOG + 1]
    _, (cat, dog, ramp) = class_scores(maps, classes, (4, 4), inverted_above=0.5)
    assert torch.equal(cat, inside / 4) and torch.equal(dog, cat)
    assert torch.equal(ramp, maps[2] / 15)  # its border has a mean of exactly a half
    _, (cat, dog, _) = class_scores(maps, classes, (4, 4))
    assert torch.equal(dog, 1 - cat)


@pytest.mark.parametrize("bad", [[0.3, 0.3], [0.3, 0.3 + 1e-8], [0.1, math.nan], [0.1, math.inf]])
def test_a_flat_map_raises(bad):
    maps = torch.tensor([[[0.0, 1.0]], [bad]])
    with pytest.raises(DiffsegError, match="class 12 is flat or not a number"):
        class_scores(maps, [CAT, DOG], (1, 2))


@pytest.mark.parametrize(("beta", "threshold"), [(0.2, 0.4), (0.0, 0.5), (0.6, 0.2)])
def test_for_one_class_the_cut_lies_at_half_of_1_minus_beta(beta, threshold):
    scores = torch.linspace(0, 1, 101)[None, None]
    label, _ = cut([CAT], scores, beta)
    clear = (scores[0] - threshold).abs() > 1e-6
    assert torch.equal((label == CAT)[clear], (scores[0] > threshold)[clear])
    assert set(label.unique().tolist()) == {0, CAT}


def test_label_and_margin_of_two_classes():
    cat = torch.tensor([[0.9, 0.1, 0.5, 0.0, 1.0, 0.25]])
    dog = torch.tensor([[0.3, 0.6, 0.25, 0.0, 1.0, 0.5]])
    label, margin = cut([CAT, DOG], torch.stack([cat, dog]), beta=0.25)
    #                    background: 0 (bounded), 0.15, 0.25, 0.75, 0, 0.25
    assert label.tolist() == [[CAT, DOG, CAT, 0, CAT, DOG]]  # equal scores: the smaller id
    expected = [0.6, 0.45, 0.25, 0.75, 0.0, 0.25]
    assert margin.tolist() == [[round(255 * m) for m in expected]]
    assert label.dtype == torch.uint8 and margin.dtype == torch.uint8


def test_a_margin_that_other_scores_rank_is_0_where_they_contradict_the_label():
    refined = torch.tensor([[[0.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]]])  # cat, cat, background
    label, margin = label_and_margin([CAT], refined, add_background(torch.tensor([[[0.9, 0.3, 0.2]]]), 0.2))
    # the background before: 0, 0.5 and 0.6
    assert label.tolist() == [[CAT, CAT, 0]] and margin.tolist() == [[round(255 * m) for m in (0.9, 0, 0.4)]]


def test_equal_scores_go_to_the_background():
    label, margin = cut([CAT], torch.tensor([[[0.5]]]), beta=0.0)
    assert label.item() == 0 and margin.item() == 0


def test_class_ids_beyond_8_bits():
    label, _ = cut([3, 919], torch.tensor([[[0.1]], [[0.9]]]))
    assert label.dtype == torch.int16 and label.item() == 919


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_a_beta_out_of_range_raises(beta):
    with pytest.raises(DiffsegError, match="beta is"):
        add_background(torch.rand(1, 2, 2), beta)


# -------------------------------------------------------------------------------------------- refiners


def red_square(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A red square on grey with a little noise, and scores of it that are blurred and displaced by two pixels."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.zeros(side, side, dtype=torch.bool)
    truth[8:24, 8:24] = True
    image = torch.where(truth, torch.tensor([0.9, 0.1, 0.1])[:, None, None], torch.tensor(0.5))
    image = (image + 0.02 * torch.randn(3, side, side, generator=rng)).clamp(0, 1)
    x = torch.arange(side).float()
    profile = torch.sigmoid((8 - (x - 17.5).abs()) / 2.5)
    scores = profile[:, None] * profile[None]
    return image, ((scores - scores.min()) / (scores.max() - scores.min()))[None], truth


def iou(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found & truth).sum() / (found | truth).sum()).item()


def test_pamr_moves_the_edge_to_the_colour_edge():
    image, scores, truth = red_square()
    label, _ = label_and_margin([CAT], get_refiner("none")(image, scores, 0.2, None))
    refined, _ = label_and_margin([CAT], get_refiner("pamr")(image, scores, 0.2, None))
    assert iou(label == CAT, truth) < 0.7 < 0.95 < iou(refined == CAT, truth)


def test_pamr_against_a_loop_over_pixels():
    rng = torch.Generator().manual_seed(0)
    image, scores = torch.rand(3, 5, 6, generator=rng), torch.rand(2, 5, 6, generator=rng)
    pixels, values = image.double().numpy(), scores.double().numpy()
    expected = np.zeros_like(values)
    for y in range(5):
        for x in range(6):
            places = [
                (min(max(y + d * dy, 0), 4), min(max(x + d * dx, 0), 5))
                for d in (1, 2)
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if (dy, dx) != (0, 0)
            ]
            around = np.array([pixels[:, v, u] for v, u in places])
            deviation = np.vstack([around, pixels[:, y, x]]).std(axis=0, ddof=1)
            unlike = (np.abs(around - pixels[:, y, x]) / (0.1 * (deviation + 0.1))).mean(axis=1)
            weights = np.exp(-unlike) / np.exp(-unlike).sum()
            expected[:, y, x] = sum(w * values[:, v, u] for w, (v, u) in zip(weights, places, strict=True))
    found = pamr(image[None], scores[None], iterations=1, dilations=(1, 2))[0]
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_pamr_does_not_depend_on_the_batch():
    images, scores = torch.rand(3, 3, 16, 16), torch.rand(3, 2, 16, 16)
    together = pamr(images, scores)
    for b in range(3):
        assert torch.allclose(together[b], pamr(images[b : b + 1], scores[b : b + 1])[0], atol=1e-6)


def test_self_attention_spreads_the_scores_over_what_reads_each_other():
    # 4 x 8 positions: the left half reads the left half, the right half the right half, rows of equal weight
    side = (torch.arange(8) < 4).repeat(4)
    same = (side[:, None] == side[None]).float()
    attention = (0.9 * same + 0.1 * (1 - same)) / 16
    scores = torch.zeros(1, 16, 32)
    scores[0, 2, 3] = 1.0  # one pixel in the left half
    refine = get_refiner("self-attention")
    refined = refine(None, scores, 0.2, attention.view(4, 8, 4, 8))
    label, _ = label_and_margin([CAT], refined)
    assert refined.shape == (2, 16, 32)
    assert (label[:, :15] == CAT).all() and (label[:, 17:] == 0).all()


def test_self_attention_is_a_power_of_the_matrix():
    rng = torch.Generator().manual_seed(0)
    attention = (torch.eye(12) * 5 + torch.rand(12, 12, generator=rng)).softmax(dim=1)
    scores = torch.rand(2, 3, 4, generator=rng)
    refined = get_refiner("self-attention")(None, scores, 0.2, attention.view(3, 4, 3, 4))
    spread = torch.stack([torch.linalg.matrix_power(attention, 4) @ s.flatten() for s in scores])
    low, high = spread.amin(1, keepdim=True), spread.amax(1, keepdim=True)
    assert torch.allclose(refined[1:].flatten(1), (spread - low) / (high - low), atol=1e-5)
    with pytest.raises(DiffsegError, match="self_resolution"):
        get_refiner("self-attention")(None, scores, 0.2, None)


def test_crf_moves_the_edge_to_the_colour_edge():
    pytest.importorskip("pydensecrf.densecrf")
    image, scores, truth = red_square()
    refined = get_refiner("crf")(image, scores, 0.2, None)
    assert torch.allclose(refined.sum(dim=0), torch.ones(32, 32), atol=1e-4)
    label, _ = label_and_margin([CAT], refined)
    assert iou(label == CAT, truth) > 0.95


def test_crf_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(DiffsegError, match="pip install pydensecrf2"):
        get_refiner("crf")


def test_an_unknown_refiner_raises():
    with pytest.raises(DiffsegError, match="'crv'.*none, pamr, self-attention, crf, sam"):
        get_refiner("crv")


# ------------------------------------------------------------------------------------ Segment Anything


def build_small_sam(checkpoint=None):
    """A Sam of the real classes, for pictures scaled to 64 pixels, in the shape of the registry's builders."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=64, embed_dim=16, depth=1, num_heads=2, out_chans=16, use_rel_pos=True, window_size=0
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=16, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=16,
            transformer=TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=16),
        ),
    )


@pytest.fixture
def small_sam(tmp_path, monkeypatch):
    from segment_anything import sam_model_registry

    monkeypatch.setitem(sam_model_registry, "small", build_small_sam)
    torch.save(build_small_sam().state_dict(), tmp_path / "small.pth")
    return tmp_path


def test_sam_gives_masks_of_the_named_classes(small_sam):
    refine = get_refiner("sam", sam_checkpoint=str(small_sam / "small.pth"), sam_model="small")
    rng = torch.Generator().manual_seed(0)
    image, scores = torch.rand(3, 24, 40, generator=rng), 0.3 * torch.rand(3, 24, 40, generator=rng)
    scores[0, 5:15, 5:15], scores[2, 10:20, 20:36] = 1.0, 0.9
    refined = refine(image, scores, 0.2, None)
    assert refined.shape == (4, 24, 40) and refined.dtype == torch.float32
    assert refined.min() >= 0 and refined.max() <= 1
    assert (refined[2] == 0).all()  # nowhere the best in attention: no prompt, no mask
    assert refined[1].std() > 0 and refined[3].std() > 0
    assert torch.allclose(refined[0], 1 - refined[1:].amax(dim=0))
    assert torch.equal(refined, refine(image, scores, 0.2, None))


def test_sam_is_prompted_with_points_and_box(small_sam):
    refine = get_refiner("sam", sam_checkpoint=str(small_sam / "small.pth"), sam_model="small")
    predictor = refine.keywords["predictor"]
    image, scores = torch.rand(3, 24, 40), torch.zeros(2, 24, 40)
    scores[0, 5:15, 4:12], scores[1, 10:20, 20:36] = 0.9, 0.9
    scores[0, 8, 6], scores[1, 12, 30] = 1.0, 1.0
    refined = refine(image, scores, 0.2, None)
    predictor.set_image((image * 255).round().byte().permute(1, 2, 0).numpy())
    logits, _, _ = predictor.predict(
        point_coords=np.array([[6, 8], [30, 12]]),
        point_labels=np.array([0, 1]),
        box=np.array([20, 10, 35, 19]),
        multimask_output=False,
        return_logits=True,
    )
    assert torch.allclose(refined[2], torch.from_numpy(logits[0]).sigmoid())


def test_the_mini_worlds_sam_refines():
    image, scores, truth = red_square()
    label, _ = label_and_margin([CAT], get_refiner("sam", "mini")(image, scores, 0.2, None))
    assert set(label.unique().tolist()) == {0, CAT}
    assert iou(label == CAT, truth) > 0.5


def test_refiners_at_hand(monkeypatch):
    names = ["none", "crf", "sam", "pamr"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refiners_at_hand(names) == ["none", "pamr"]
    assert refiners_at_hand(names, "a.pth") == ["none", "sam", "pamr"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert refiners_at_hand(names) == ["none", "crf", "pamr"]


def test_a_sam_checkpoint_that_does_not_fit_raises(small_sam):
    other = build_small_sam()
    other.mask_decoder = torch.nn.Linear(2, 2)
    torch.save(other.state_dict(), small_sam / "other.pth")
    (small_sam / "text.pth").write_text("not weights")
    torch.save([1, 2], small_sam / "list.pth")
    for name in ("other.pth", "text.pth", "list.pth"):
        with pytest.raises(DiffsegError, match=f"{name} does not fit the model small"):
            get_refiner("sam", str(small_sam / name), "small")
    with pytest.raises(DiffsegError, match="there is no sam_checkpoint"):
        get_refiner("sam", str(small_sam / "absent.pth"), "small")
    with pytest.raises(DiffsegError, match="needs sam_checkpoint"):
        get_refiner("sam", "", "small")
    with pytest.raises(DiffsegError, match="sam_model is 'vit_x'; choose one of .*vit_b"):
        get_refiner("sam", "a.pth", "vit_x")


# --------------------------------------------------------------------------------------- all refiners


@pytest.mark.parametrize("name", list(REFINERS))
def test_no_refiner_names_another_class(name, small_sam):
    if name == "crf":
        pytest.importorskip("pydensecrf.densecrf")
    refine = get_refiner(name, str(small_sam / "small.pth"), "small")

    @settings(max_examples=15, deadline=None)
    @given(st.sets(st.integers(1, 919), min_size=1, max_size=3), st.sampled_from([0.0, 0.2, 0.7]), st.integers(0, 99))
    def check(classes, beta, seed):
        rng = torch.Generator().manual_seed(seed)
        maps = torch.rand(len(classes), 4, 6, generator=rng)
        attention = torch.rand(4, 6, 4, 6, generator=rng).flatten(2).softmax(dim=2).view(4, 6, 4, 6)
        ids, scores = class_scores(maps, sorted(classes), (16, 24))
        refined = refine(torch.rand(3, 16, 24, generator=rng), scores, beta, attention)
        assert refined.shape == (1 + len(classes), 16, 24) and refined.dtype == torch.float32
        assert refined.min() >= -1e-6 and refined.max() <= 1 + 1e-6
        label, margin = label_and_margin(ids, refined)
        assert label.shape == margin.shape == (16, 24)
        assert set(label.unique().tolist()) <= {0, *classes}

    check()


# --------------------------------------------------------------------------------- axes that squares do not tell apart


def test_the_border_is_all_four_sides_and_its_corners_count_once():
    posts = torch.tensor([1.0, 0, 0, 1]).expand(1, 4, 4)  # 8 of the 12 positions along the border
    for above, inverted in ((0.6, True), (0.7, False)):
        _, scores = class_scores(posts, [CAT], (4, 4), above)
        assert bool(scores[0, 0, 0] == 0) == inverted


def test_maps_and_reach_of_wide_images_go_by_the_shorter_side():
    maps = torch.rand(1, 1, 8, 16)
    assert torch.equal(WordMaps({"layer": maps}, [[0]]).mean((8,), [0]), maps[0])
    image, scores = torch.rand(1, 3, 16, 64), torch.rand(1, 2, 16, 64)
    assert torch.equal(pamr(image, scores), pamr(image, scores, dilations=(1,)))


def test_a_sam_checkpoint_runs_no_code(tmp_path):
    class Writes:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save(Writes(), tmp_path / "sam.pth")
    with pytest.raises(DiffsegError, match="does not fit the model"):
        get_refiner("sam", str(tmp_path / "sam.pth"), "vit_b")
    assert not (tmp_path / "run").exists()
