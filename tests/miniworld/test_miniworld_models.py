"""The mini world's judges: the oracle, the small Sam, and the measuring of the generator by them."""

import json

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from diffseg.benchmarks.classes import VOC
from diffseg.errors import DiffsegError
from diffseg.experiments import oracle, small_sam, worst
from diffseg.experiments.generator import measure
from diffseg.experiments.generator.asked import ask, pair_prompts, single_prompts
from diffseg.experiments.generator.measure import judge, nearest_distances, place_of
from diffseg.experiments.oracle import Scenes, stream
from diffseg.experiments.small_sam import Prompts, decode, make_prompts
from diffseg.experiments.trainer import parser_of
from diffseg.generator import load_generator
from diffseg.miniworld.oracle import CLASS_IDS, CLASS_OF_PICTURE, PICTURE_NAMES, PICTURES, Oracle
from diffseg.miniworld.scenes import PLACES, paint_background
from diffseg.small_sam import CONFIG, build_small_sam

TINY = CONFIG | {"width": 32, "depth": 2, "prompt_width": 32}
ID = {name: k for k, name in enumerate(PICTURE_NAMES)}


def see(label: np.ndarray) -> torch.Tensor:
    """Return probabilities of an oracle that is sure of a map of picture ids."""
    return torch.nn.functional.one_hot(torch.from_numpy(label).long(), len(PICTURE_NAMES)).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def network() -> Oracle:
    torch.manual_seed(0)
    return Oracle().eval()


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return build_small_sam(**TINY).eval()


# ------------------------------------------------------------------------------------------- scenes and classes


def test_training_scenes_are_endless_and_start_anywhere():
    batches = stream(Scenes(0, "oracle"), 0, 3, 0)
    next(batches)
    for one, other in zip(next(batches), next(stream(Scenes(0, "oracle"), 3, 3, 0)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(stream(Scenes(0, "sam"), 0, 1, 0))[0], next(stream(Scenes(0, "oracle"), 0, 1, 0))[0])


def test_picture_labels_and_class_labels_agree():
    for index in range(20):
        scene = oracle.free_scene(0, "test", index)
        classes = CLASS_OF_PICTURE[torch.from_numpy(oracle.picture_label(scene))]
        assert np.array_equal(classes, scene.label(CLASS_IDS))
    assert CLASS_OF_PICTURE[ID["poodle"]] == CLASS_OF_PICTURE[ID["dog"]] == CLASS_IDS["dog"]
    assert CLASS_OF_PICTURE[ID["traffic light"]] == 0


def test_a_class_has_the_sum_of_its_pictures():
    p = torch.zeros(1, len(PICTURE_NAMES), 1, 1)
    p[0, 0], p[0, ID["dog"]], p[0, ID["poodle"]], p[0, ID["cat"]] = 0.35, 0.2, 0.2, 0.25
    classes = oracle.class_probabilities(p)[0, :, 0, 0]
    assert p.argmax() == 0 and classes.argmax() == CLASS_IDS["dog"]  # no dog's picture is the most likely, a dog is
    assert classes[CLASS_IDS["dog"]] == pytest.approx(0.4) and classes.sum() == pytest.approx(1)
    assert oracle.main_picture(p).item() == ID["cat"]  # never the background


def test_degraded_pictures_stay_pictures():
    images = torch.rand(4, 3, 64, 64)
    degraded = oracle.degrade(images, np.random.default_rng(0))
    assert degraded.shape == images.shape and 0 <= degraded.min() and degraded.max() <= 1
    assert not torch.equal(degraded, images)


def test_the_vae_renders_the_same_pictures_a_little_worse():
    """With the noise that a picture may get it stays the same picture; another call with the same rng repeats it."""
    images = next(stream(Scenes(0, "sam"), 0, 8, 0))[0] / 255
    vae = load_generator("mini", "cpu").vae
    rendered = small_sam.through_vae(images, vae, np.random.default_rng(0))
    assert rendered.shape == images.shape and 0 <= rendered.min() and rendered.max() <= 1
    psnr = -10 * (rendered - images).square().mean(dim=(1, 2, 3)).log10()
    assert 18 < psnr.min() and psnr.max() < 35
    assert torch.equal(rendered, small_sam.through_vae(images, vae, np.random.default_rng(0)))


def test_the_oracle_as_a_network_of_classes(network):
    logits = oracle.ClassOracle(network)(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, VOC.num_classes, 64, 64)
    assert torch.allclose(logits.exp().sum(dim=1), torch.ones(2, 64, 64), atol=1e-4)


def test_both_models_fit_the_repository():
    """19 MB are left beside the generator; half precision takes two bytes a weight."""
    networks = Oracle(), build_small_sam(**CONFIG)
    assert 2 * sum(p.numel() for one in networks for p in one.parameters()) < 19e6


# ------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize("place", PLACES)
def test_a_border_tells_its_place(place):
    image = np.clip(paint_background(np.random.default_rng(1), place, 64, 64), 0, 255).astype(np.uint8)
    free = np.ones((64, 64), bool)
    found, distance = place_of(image, free)
    assert found == place and distance < measure.MOST_DISTANCE
    image[:, :32], free[:, :32] = (255, 0, 255), False  # an object may cover half of the border
    assert place_of(image, free)[0] == place


def test_a_border_of_no_place():
    magenta = np.full((64, 64, 3), (255, 0, 255), np.uint8)
    assert place_of(magenta, np.ones((64, 64), bool))[1] > measure.MOST_DISTANCE
    assert place_of(magenta, np.zeros((64, 64), bool)) == ("", float("inf"))


def test_judging_one_object():
    seen = np.zeros((64, 64), int)
    seen[16:48, 16:48] = ID["poodle"]
    seen[0:8, 0:8] = ID["cat"]
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[16:48, 16:32] = CLASS_IDS["dog"]  # half of it
    image = np.clip(paint_background(np.random.default_rng(1), "on the sand", 64, 64), 0, 255).astype(np.uint8)
    asked = ask(0, [(ID["poodle"], "poodle")], "on the sand", 0)
    row = judge(asked, image, label, see(seen))
    assert row["present"] and row["own_picture"] and row["background"] and row["relation"] == "hyponym"
    assert row["iou"] == 0.5 and row["iou_object"] == pytest.approx(512 / (1024 + 64))
    plain = judge(ask(0, [(ID["dog"], "dog")], "on the water", 0), image, label, see(seen))
    assert plain["present"] and not plain["own_picture"] and not plain["background"] and plain["relation"] == "plain"
    cat = judge(ask(0, [(ID["cat"], "cat")], "on the sand", 0), image, label, see(seen))
    assert not cat["present"] and cat["iou"] == 0  # there, but not the largest
    empty = judge(asked, image, label, see(np.zeros((64, 64), int)))
    assert not empty["present"] and empty["iou"] == 0 and empty["iou_object"] == 0


def test_judging_two_objects():
    seen = np.zeros((64, 64), int)
    seen[:, :20] = ID["cat"]
    asked = ask(0, [(ID["cat"], "cat"), (ID["bus"], "bus")], "at night", 0)
    image, label = np.zeros((64, 64, 3), np.uint8), torch.zeros(64, 64, dtype=torch.uint8)
    assert not judge(asked, image, label, see(seen))["both"]
    seen[0, 60:] = ID["bus"]  # too small to count
    assert not judge(asked, image, label, see(seen))["both"]
    seen[:, 50:] = ID["bus"]
    assert judge(asked, image, label, see(seen))["both"]


def test_distances_of_layouts():
    layouts = torch.zeros(3, 4, 4, dtype=torch.bool)
    layouts[0, :2], layouts[1, 0], layouts[2, 3] = True, True, True
    assert nearest_distances(layouts).tolist() == [0.5, 0.5, 1.0]
    assert nearest_distances(layouts[[0, 0]]).tolist() == [0.0, 0.0]


def test_copies_are_no_diversity():
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
    rows = [{"class": "cat", "objects": torch.from_numpy(scene[..., 0] > 128)} for scene in scenes]
    various = measure.diversity(rows, scenes)
    copies = measure.diversity(rows[:1] * 4, scenes[:1] * 4)
    assert various["distinct_layouts"] == 1 and various["layout"] > 0.3 and various["colours"] > 0.1
    assert copies["distinct_layouts"] == 0 and copies["layout"] == 0 and copies["colours"] < 1e-3


def test_diversity_is_the_same_to_the_last_bit_in_every_process():
    """Python's hashes of texts, and with them the order of a set, differ between processes as these names do."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(40)]
    objects = [torch.from_numpy(image[..., 0] > 128) for image in images]
    rows = [[{"class": f"{name}{k % 10}", "objects": seen} for k, seen in enumerate(objects)] for name in "abcdefgh"]
    first, *others = (measure.diversity(named, images) for named in rows)
    assert all(other == first for other in others)


def test_prompts_ask_for_every_word_and_mark_it():
    asked = single_prompts(945, 0)
    words = [word for picture in PICTURES if picture.voc_class for word in picture.words]
    assert {one.prompt.words[0] for one in asked} == set(words) and len(words) == 105
    assert len({(one.prompt.words, one.place) for one in asked}) == 945  # every word on every place
    for one in [*asked, *pair_prompts(50, 0)]:
        assert [one.prompt.prompt[start:end] for start, end in one.prompt.spans] == list(one.prompt.words)
        assert one.prompt.prompt.endswith(one.place) and len(set(one.prompt.classes)) == len(one.pictures)
        for name, k in zip(one.prompt.words, one.pictures, strict=True):
            assert name in PICTURES[k - 1].words
    assert len({one.prompt.seed for one in asked}) == len(asked)


# ------------------------------------------------------------------------------------------- the small Sam


def test_prompts_point_at_their_objects():
    images, _, instances = next(stream(Scenes(0, "sam"), 0, 4, 0))
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(40):
        prompts, truths = make_prompts(instances, 2, rng)
        assert truths.shape == (4, 2, 64, 64) and truths.flatten(2).any(dim=2).all()
        kinds.add((prompts.points is not None, prompts.boxes is not None, prompts.masks is not None))
        if prompts.points is not None:
            x, y = prompts.points.long().unbind(-1)
            b, k = torch.meshgrid(torch.arange(4), torch.arange(2), indexing="ij")
            on = truths[b[..., None], k[..., None], y, x]
            assert torch.equal(on, prompts.point_labels == 1)
        if prompts.boxes is not None:
            assert (prompts.boxes[..., :2] <= prompts.boxes[..., 2:]).all()
            assert prompts.boxes.min() >= 0 and prompts.boxes.max() <= 63
    assert len(kinds) == 6  # points, box or both, each with and without a coarse mask


def test_a_correction_clicks_where_the_answer_is_wrong():
    truths = torch.zeros(1, 2, 64, 64, dtype=torch.bool)
    truths[..., 10:20, 10:20] = True
    logits = torch.full((1, 2, 64, 64), -5.0)
    logits[0, 1, 10:20, 10:20] = 5
    logits[0, 1, 40, 41] = 5  # the second answer has one pixel too many
    boxes = torch.tensor([[[10.0, 10, 19, 19]] * 2])
    prompts = small_sam.correct(Prompts(None, None, boxes, None), logits, truths, np.random.default_rng(0))
    assert prompts.point_labels.tolist() == [[[1], [0]]]
    assert truths[0, 0, int(prompts.points[0, 0, 0, 1]), int(prompts.points[0, 0, 0, 0])]
    assert prompts.points[0, 1, 0].tolist() == [41, 40] and prompts.masks.shape == (1, 2, 1, 64, 64)


@pytest.mark.parametrize("kind", ["click", "points and box", "box and mask"])
def test_all_pictures_at_once_are_answered_as_by_the_predictor(sam, kind):
    """segment-anything's own predictor, one picture and prompt at a time, gives the same logits."""
    images = next(stream(Scenes(0, "sam"), 0, 2, 0))[0]
    rng = np.random.default_rng(0)
    count = {"click": 1, "points and box": 2}.get(kind, 0)
    prompts = Prompts(
        torch.from_numpy(rng.uniform(0, 63, (2, 3, count, 2))).float() if count else None,
        torch.from_numpy(rng.integers(0, 2, (2, 3, count))) if count else None,
        None if kind == "click" else torch.tensor([5.0, 10, 40, 50]).expand(2, 3, 4),
        torch.from_numpy(rng.normal(0, 3, (2, 3, 1, 64, 64))).float() if "mask" in kind else None,
    )
    with torch.inference_mode():
        logits, quality = decode(sam, sam.image_encoder(sam.preprocess(images.float())), prompts)
    assert logits.shape == (2, 3, 3 if kind == "click" else 1, 64, 64)
    predictor = SamPredictor(sam)
    for b in range(2):
        predictor.set_image(images[b].permute(1, 2, 0).contiguous().numpy())
        for k in range(3):
            parts = [
                None if part is None else part[b, k].numpy()
                for part in (prompts.points, prompts.point_labels, prompts.boxes, prompts.masks)
            ]
            expected, iou, _ = predictor.predict(*parts, multimask_output=kind == "click", return_logits=True)
            assert np.allclose(logits[b, k], expected, atol=1e-3) and np.allclose(quality[b, k], iou, atol=1e-4)


def test_sams_loss_judges_the_best_answer_only():
    truths = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    truths[..., :4] = True
    right = torch.where(truths, 20.0, -20.0)
    logits = torch.stack([-right, right, torch.zeros_like(right)], dim=2).requires_grad_()
    quality = torch.tensor([[[0.0, 1.0, 0.0]]])
    loss, best = small_sam.sam_loss(logits, quality, truths)
    assert loss.item() == pytest.approx(0, abs=1e-3) and torch.equal(best[0, 0] > 0, truths[0, 0])
    loss.backward()
    assert logits.grad[:, :, [0, 2]].abs().max() == 0
    wrong, _ = small_sam.sam_loss(logits[:, :, :1], quality[..., :1], truths)
    assert wrong > 5


def test_coarse_masks_are_like_attention():
    truths = next(stream(Scenes(0, "sam"), 0, 16, 0))[2][:, None] == 1
    ious = small_sam.iou_of(small_sam.coarse_logits(truths, np.random.default_rng(0))[:, :, 0], truths)
    assert 0.4 < ious.mean() < 0.9


# ------------------------------------------------------------------------------------------- files


def test_half_precision_round_trips(network, sam, tmp_path):
    oracle.save_half(network, tmp_path / "oracle", {"classes": PICTURE_NAMES})
    oracle.save_half(sam, tmp_path / "sam", TINY)
    assert all(path.suffix in (".safetensors", ".json") for path in tmp_path.rglob("*") if path.is_file())
    for one, other in (
        (network, oracle.load_oracle(tmp_path / "oracle")),
        (sam, small_sam.load_small_sam(tmp_path / "sam")),
    ):
        for key, value in one.state_dict().items():
            loaded = other.state_dict()[key]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value.half().to(value.dtype)), key
        assert not other.training


@pytest.mark.parametrize("load", [oracle.load_oracle, small_sam.load_small_sam])
def test_damaged_weights_are_named(load, network, sam, tmp_path):
    with pytest.raises(DiffsegError, match="restore the package's weights"):
        load(tmp_path)
    oracle.save_half(network if load is oracle.load_oracle else sam, tmp_path, {"classes": ["cat"]} | TINY)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DiffsegError, match="restore the package's weights"):
        load(tmp_path)


def test_an_oracle_of_other_pictures_is_refused(network, tmp_path):
    oracle.save_half(network, tmp_path, {"classes": ["background", "cat"]})
    with pytest.raises(DiffsegError, match="other pictures"):
        oracle.load_oracle(tmp_path)


# ------------------------------------------------------------------------------------------- training


def train_some(module, folder, **changes):
    """Train a model for a few steps by its own recipe and return its checkpoint."""
    train = module.train_oracle if module is oracle else module.train_sam
    options = parser_of("", 1e-3, "test", "test").parse_args(["train", "--device", "cpu"])
    vars(options).update({"batch": 2, "every": 2, "steps": 4, "per_picture": 1} | changes)
    train(folder, options)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("module", [oracle, small_sam], ids=["oracle", "small_sam"])
def test_a_resumed_training_equals_an_uninterrupted_one(module, tmp_path, monkeypatch):
    """Cut in the third of four steps and resumed from the second's checkpoint: the same weights, bit for bit."""
    if module is small_sam:
        monkeypatch.setattr(small_sam, "CONFIG", TINY)
    whole = train_some(module, tmp_path / "whole")
    draw = oracle.free_scene

    def cut(seed, name, index, *rest):
        if index >= 4:  # the third step's scenes
            raise KeyboardInterrupt
        return draw(seed, name, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(oracle, "free_scene", cut)
        train_some(module, tmp_path / "cut")
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = train_some(module, tmp_path / "cut")
    assert resumed["step"] == 4 and resumed["samples"] == 8
    for part in ("modules", "average"):
        (before,), (after,) = whole[part].values(), resumed[part].values()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_export_writes_a_small_sam_that_the_predictor_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(small_sam, "CONFIG", TINY)
    train_some(small_sam, tmp_path / "run")
    note = small_sam.export_sam(tmp_path / "run", tmp_path / "sam", scenes=16)
    card = (tmp_path / "sam" / "README.md").read_text(encoding="utf-8")
    assert f"{note['parameters']:,} parameters" in card and f"{note['held_out']['point']:.1%}" in card
    assert sorted(path.name for path in (tmp_path / "sam").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    predictor = SamPredictor(small_sam.load_small_sam(tmp_path / "sam"))
    predictor.set_image(np.zeros((64, 128, 3), np.uint8))  # a wide picture is shrunk and padded
    masks, _, _ = predictor.predict(np.array([[100, 30]]), np.array([1]))
    assert masks.shape == (3, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize("module", [oracle, small_sam], ids=["oracle", "small_sam"])
def test_the_loss_falls(module, tmp_path):
    rate = 1e-2 if module is oracle else 2e-3  # higher than in earnest, as 40 steps are a fifth of the warm-up
    train_some(module, tmp_path, steps=40, batch=16, every=10, rate=rate)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_the_generator_is_measured_in_one_go(network, tmp_path):
    """With an untrained oracle the numbers mean nothing, but all of them are there, in 0..1 or null."""
    oracle.save_half(network, tmp_path / "oracle", {"classes": PICTURE_NAMES})
    held_out = {"object_iou": 0.0, "pixel_accuracy": 0.0, "picture_accuracy": 0.0, "scenes": 0}
    note = {"miou": 0.0, "samples": 0, "parameters": 0, "held_out": held_out}
    (tmp_path / "oracle" / "training.json").write_text(json.dumps(note))
    arguments = ["--oracle", str(tmp_path / "oracle"), "--results", str(tmp_path / "results"), "--device", "cpu"]
    small = ["--pictures", "4", "--pairs", "2", "--sampling-steps", "3", "--attention-steps", "all"]
    measure.main([*arguments, *small, "--refiners", "pamr"])
    report = json.loads((tmp_path / "results" / "mini_generator.json").read_text())
    assert report["pictures"] == 4 and report["pairs"] == 2 and report["pictures_per_second"] > 0
    for part in (report, report["real"]):
        for name in (*measure.MEASURES, "both_present", "class_present_plain_words", "mask_iou_object_plain_words"):
            assert 0 <= part[name] <= 1, name
    assert report["scenes"].keys() == report["scenes_pairs"].keys() == {"psnr", "loss", "mask_iou", "mask_iou_pamr"}
    assert set(report["refined"]) == {"pamr"} and len(list((tmp_path / "results" / "figures").glob("*.png"))) == 3


def test_the_sheet_of_worst_answers_begins_with_the_worst(tmp_path):
    image, truth = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.long)
    truth[:32] = 3
    half, other = truth.clone(), truth.clone()
    half[16:32], other[:32] = 0, 5  # an IoU of one half, and none
    answers = [(image, truth, found) for found in (truth, half, other)]
    assert worst.save_worst(iter(answers), tmp_path / "sheet.png", worst.VOC.classes, columns=2) == [0.0, 0.5]
    assert (tmp_path / "sheet.png").is_file()
    seen = list(worst.sam_answers(4))
    assert len(seen) == 4 and min(worst.mean_iou(truth, found) for _, truth, found in seen) > 0.5
    seen = list(worst.oracle_answers(24))
    assert len(seen) == 23 and min(worst.mean_iou(truth, found) for _, truth, found in seen) > 0.5  # one shows no class
