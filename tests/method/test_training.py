"""Segmenters and their training at tiny size."""

import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_training import CLASSES, OPTIONS, changed, halves, same, trained

from diffseg import cotraining, segmenters, training
from diffseg.augmentation import Augmented
from diffseg.errors import DiffsegError
from diffseg.paths import locate, project_root
from diffseg.reliability import TAUGHT, trusted_pixels
from diffseg.segmenters import (
    SEGMENTERS,
    STAGES,
    WEIGHTS,
    Ensemble,
    FromTransformers,
    ResidualBlock,
    Segmenter,
    load_segmenter,
    new_networks,
    save_segmenter,
)
from diffseg.training import HISTORY, answers_of, measures, mix, step_losses, train, train_once
from diffseg.training_options import NETWORKS


@pytest.fixture(scope="module")
def baseline():
    return trained(halves(margin=True))


def test_training_learns_an_easy_task_and_repeats_exactly(baseline):
    network, history = baseline
    again, history_again = trained(halves(margin=True))
    assert history == history_again and len(history["loss"]) == OPTIONS.iterations
    assert same(network, again)
    assert sum(history["loss"][-3:]) < 0.7 * sum(history["loss"][:3])


def test_an_ensemble_is_two_baselines(baseline):
    """Same images, same augmentation: the first is bit-identical to the baseline, the second is another network."""
    ensemble, history = trained(halves(margin=True), changed(training_mode="ensemble"))
    assert same(ensemble.networks[0], baseline[0]) and not same(ensemble.networks[1], baseline[0])
    assert history["valid"] == baseline[1]["valid"] and history["contradicted"] == baseline[1]["contradicted"]
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        first, second = (network(image) for network in ensemble.networks)
        assert torch.allclose(ensemble(image), (first + second) / 2)


def test_two_networks_hear_each_other_and_one_itself():
    """All labels are doubtful and say 0; the first network says 1, the second 2."""
    label, nothing = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool)
    logits = [torch.eye(3)[k].view(1, 3, 1, 1).repeat(1, 1, 4, 4).requires_grad_() for k in (1, 2)]

    def taught(mode: str, count: int, **changes) -> list[int]:
        """The class towards which each network's loss moves it."""
        options, some = changed(training_mode=mode, mixing=0.0, **changes), logits[:count]
        answers = answers_of(some, torch.rand(1, 3, 4, 4), label, nothing, named, options, background=0)
        losses = step_losses(some, label, nothing, None, answers, options, 255)
        gradients = [torch.autograd.grad(loss, own)[0] for loss, own in zip(losses, some, strict=True)]
        return [int(gradient[0, :, 0, 0].argmin()) for gradient in gradients]

    named = torch.tensor([[True, True, False]])
    assert taught("cotrain", 2) == [2, 1] and taught("selftrain", 1) == [1]
    assert taught("cotrain", 2, peer_refiner="pamr") == [2, 1]  # nothing to refine in a constant answer
    assert taught("cotrain", 2, peer_classes="image") == [1, 1]  # what is said of class 2 counts for class 1
    assert taught("baseline", 1) == [0]


@pytest.mark.parametrize("mode", ("cotrain", "selftrain", "urn"))
def test_robust_modes_learn_the_easy_task(mode):
    options = changed(training_mode=mode, iterations=16, urn_powers=(0.5, 0.7, 1.5, 2.0))
    network, history = trained(halves(margin=True), options)
    _, image, label, _ = halves(margin=True)[0]
    with torch.inference_mode():
        seen = network(image[None] / 255).argmax(dim=1)[0]
    assert (seen == label).float().mean() > 0.8
    assert 0 < history["trusted"][0] < 0.8
    assert ("disagreement" in history) == (mode == "cotrain")


def test_half_of_each_class_is_trusted_on_the_whole_picture():
    _, _, label, reliability = halves(margin=True)[0]
    trusted = trusted_pixels(label, reliability, changed(training_mode="cotrain", reliable_share=0.25))
    assert trusted[:4].all() and trusted[-4:].all() and trusted.sum() == 8 * 32
    for mode in ("baseline", "ensemble"):
        assert trusted_pixels(label, reliability, changed(training_mode=mode)).all()
    assert trusted_pixels(label, None, changed(training_mode="cotrain")).all()


def test_the_reliable_share_of_the_whole_set_may_leave_a_picture_without_any():
    name, image, label, reliability = halves(margin=True)[0]
    weak = (name, image, label, torch.stack([reliability[0] // 4, reliability[1]]))
    options = changed(training_mode="cotrain", reliable_rule="set", scale_jitter=(1.0, 1.0))
    pictures = [(name, image, label, reliability), weak, (name, image, torch.full_like(label, 255), reliability)]
    seen = Augmented(pictures, 255, options, seed=0)
    trusted = [seen.view(k, 0)[3] for k in range(3)]
    assert trusted[0].sum() > trusted[1].sum() and not trusted[2].any()
    _, history = trained(pictures, changed(training_mode="cotrain", reliable_rule="set", iterations=6, warmup=0.5))
    assert torch.tensor(history["loss"]).isfinite().all()


def test_mixing_pastes_confident_classes_of_the_neighbour(baseline):
    images = torch.stack([image for _, image, *_ in halves(4)]).float() / 255
    images[1::2] = images[1::2].flip(2)  # the neighbours' objects lie below
    label = torch.stack([label for _, _, label in halves(4)])
    label[1::2] = label[1::2].flip(1)
    trusted = torch.zeros_like(label, dtype=torch.bool)
    options = changed(mixing=1.0, mixing_confidence=0.5)
    before = {key: value.clone() for key, value in baseline[0].state_dict().items()}
    mixed, new_label, new_trusted, band = mix(
        [baseline[0]], images, label, trusted, options, 0, 255, torch.Generator().manual_seed(0)
    )
    baseline[0].eval()
    with torch.no_grad():
        best, online = baseline[0](images).softmax(dim=1).max(dim=1)
    pasted = ((online == 1) & (best > 0.5))[neighbours := [1, 0, 3, 2]]
    assert 0.2 < pasted.float().mean() < 0.8 and (new_label[pasted] == 1).all() and new_trusted[pasted].all()
    assert torch.equal(mixed, torch.where(pasted[:, None], images[neighbours], images))
    assert torch.equal(band, cotraining.boundary_band(pasted)) and band.any()
    sure = (best > 0.5) & ~pasted  # of two classes one is always above a half, but for what rounds to it
    assert torch.equal(new_trusted & ~pasted, sure) and torch.equal(new_label[sure], online[sure])
    assert all(torch.equal(value, before[key]) for key, value in baseline[0].state_dict().items())
    unchanged = mix([baseline[0]], images, label, trusted, changed(mixing=0.0), 0, 255, torch.Generator())
    assert torch.equal(unchanged[0], images) and not unchanged[3].any()
    odd = mix([baseline[0]], images[:3], label[:3], trusted[:3], options, 0, 255, torch.Generator().manual_seed(0))
    assert torch.equal(odd[1][2], label[2]) and not odd[2][2].any() and not odd[3][2].any()  # it has no neighbour


class Cut(list):
    """A data set that breaks down when its n-th item is read."""

    left = 10**9

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "options",
    (
        {"optimizer": "adamw"},
        {"warmup_pixels": "all", "peer_classes": "image", "peer_refiner": "pamr", "mixing": 0.0},
        pytest.param({"optimizer": "sgd", "ema": 0.9, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "sgd", "precision": "fp16"}, marks=pytest.mark.slow),  # with its scaler of losses
    ),
    ids=str,
)
def test_an_interrupted_cotraining_resumes_bit_identical(tmp_path, options):
    options = changed(training_mode="cotrain", iterations=8, checkpoint_every=3, mixing_confidence=0.5, **options)
    whole, history = trained(Cut(halves(margin=True)), options)
    cut = Cut(halves(margin=True))
    cut.left = 5 * OPTIONS.training_batch + 1
    with pytest.raises(KeyboardInterrupt):
        trained(cut, options, checkpoint=tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(saved["history"]["loss"]) == 3
    network, resumed = trained(Cut(halves(margin=True)), options, checkpoint=tmp_path / "checkpoint.pt")
    assert resumed == history and same(network, whole)
    # finished: nothing is left to do, and the history is still there
    finished, again = trained(Cut(halves(margin=True)), options, checkpoint=tmp_path / "checkpoint.pt")
    assert again == history and same(finished, whole)


@pytest.mark.parametrize("mode", NETWORKS)
def test_in_bf16_every_weight_moves_in_a_step_with_mixing(mode, monkeypatch):
    """SGD without decay moves what has a gradient: the weights differ before and after the second of two steps."""
    options = changed(
        training_mode=mode, precision="bf16", optimizer="sgd", weight_decay=0.0, training_batch=2, iterations=2,
        warmup=0.5, mixing=1.0, mixing_confidence=0.0,
    )  # fmt: skip
    network, before, mixed = new_networks(NETWORKS[mode], "unet-resnet18", CLASSES, 0), {}, []

    class Watched(list):
        def __getitem__(self, index):  # the last two of four images are read when the first step is over
            before.update({name: value.detach().clone() for name, value in network.named_parameters()})
            return super().__getitem__(index)

    def mix_outside(*arguments):  # torch of 2025 keeps what it casts without a gradient for the pass that learns
        mixed.append(torch.is_autocast_enabled("cpu"))
        return mix(*arguments)

    monkeypatch.setattr(training, "mix", mix_outside)
    train(network, Watched(halves(2, margin=True)), 255, options, 0)
    assert [name for name, value in network.named_parameters() if torch.equal(value, before[name])] == []
    assert mixed == [False] * (mode in TAUGHT)


def test_a_network_that_is_there_is_not_trained_again(tmp_path):
    options, made = changed(iterations=3), []

    def make():
        made.append(new_networks(1, "upernet-swin-mini", CLASSES, 0))
        return made[-1]

    history = train_once(tmp_path / "synthetic", make, halves(), 255, options, 0)
    assert history == trained(halves(), options)[1]
    assert {path.name for path in (tmp_path / "synthetic").iterdir()} == {"model.safetensors", "config.json", HISTORY}
    assert same(load_segmenter(tmp_path / "synthetic"), made[0])
    (tmp_path / "synthetic.checkpoint.pt").unlink()  # as it is after the step
    found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train_once(tmp_path / "synthetic", make, [], 255, options, 0) == history
    assert len(made) == 1 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == found
    (tmp_path / "synthetic" / "model.safetensors").unlink()  # as if it had been killed before its last file
    assert train_once(tmp_path / "synthetic", make, halves(), 255, options, 0) == history and len(made) == 2


def test_a_foreign_or_damaged_checkpoint_is_one_sentence(tmp_path):
    path, options = tmp_path / "checkpoint.pt", changed(iterations=1)
    trained(halves(), options, checkpoint=path)
    with pytest.raises(DiffsegError, match="other options; delete it"):
        trained(halves(), changed(iterations=1, learning_rate=1e-3), checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DiffsegError, match="no usable checkpoint"):
        trained(halves(), options, checkpoint=path)


def test_a_loss_that_is_not_finite_names_iteration_and_pictures_and_keeps_the_checkpoint(tmp_path):
    options = changed(learning_rate=float("inf"), checkpoint_every=1)
    with pytest.raises(DiffsegError, match=r"iteration 1 \(images picture_"):
        trained(halves(), options, checkpoint=tmp_path / "checkpoint.pt")
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]["loss"]) == 1


def test_an_ignored_picture_is_harmless_and_a_set_of_them_an_error():
    nothing = [(name, image, torch.full_like(label, 255)) for name, image, label in halves()]
    _, history = trained([*halves(3), *nothing[:1]], changed(iterations=2))
    assert all(value > 0 for value in history["loss"])
    with pytest.raises(DiffsegError, match="no pixel of the training set"):
        trained(nothing)


def test_the_average_of_weights_is_what_is_left(baseline):
    network, _ = trained(halves(margin=True), changed(ema=0.999))
    assert not same(network, baseline[0])
    slow, fast = network.state_dict(), baseline[0].state_dict()
    start = new_networks(1, "upernet-swin-mini", CLASSES, 0).state_dict()
    key = "network.model.decode_head.classifier.weight"
    assert (slow[key] - start[key]).norm() < (fast[key] - start[key]).norm()


def test_picture_label_and_trust_are_transformed_together():
    """Wherever the view is red, the label is 1; padding is ignored and never trusted; trust keeps off the edge."""
    options = changed(colour_jitter=0.0, scale_jitter=(0.5, 1.5), training_mode="cotrain", blur=0.0)
    augmented = Augmented(halves(margin=True), 255, options)
    for k in range(8):
        name, image, label, trusted = augmented[k]
        assert image.shape == (3, 32, 32) and 0 <= image.min() and image.max() <= 1
        red, blue = image[0] > 0.8, image[2] > 0.8
        assert (label[red] == 1).float().mean() > 0.97 and (label[blue] == 0).float().mean() > 0.97
        padding = image.amax(dim=0) == 0
        assert (label[padding] == 255).all() and not trusted[padding].any()
        edge = (label[1:] != label[:-1]) & (label[1:] != 255) & (label[:-1] != 255)
        assert not (trusted[1:] & edge).any() and not (trusted[:-1] & edge).any()


def test_labels_lie_on_what_is_seen_at_every_scale():
    """A white disk and its label have the same middle in every view, to a tenth of a pixel on average."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disk = (rows - 30) ** 2 + (columns - 33) ** 2 < 144
    image = (255 * disk).byte().expand(3, 64, 64).contiguous()
    options = changed(crop=64, colour_jitter=0.0, scale_jitter=(0.8, 1.2), blur=0.0, iterations=25, training_batch=4)
    off = []
    for _, view, label, _ in (view for view in Augmented([("disk", image, disk.long())], 255, options)):
        seen, named = view[0], (label == 1).float()
        off.append([(seen * axis).sum() / seen.sum() - (named * axis).sum() / named.sum() for axis in (rows, columns)])
        assert ((seen > 0.5) == (named > 0)).float().mean() > 0.985
    assert torch.tensor(off).mean(dim=0).abs().max() < 0.1


def test_views_depend_on_their_place_only():
    first, second = Augmented(halves(), 255, changed(blur=1.0)), Augmented(halves(), 255, changed(blur=1.0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first[7][1:], second[7][1:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.view(0, 1)[1], first.view(0, 2)[1])
    assert sorted(first[k][0] for k in range(8)) == sorted(name for name, *_ in halves())  # an epoch has each once


@pytest.mark.parametrize(
    "wrong",
    (
        {"precision": "fp8"},
        {"training_mode": "robust"},
        {"optimizer": "lion"},
        {"warmup": 1.5},
        {"ema": 1.0},
        {"warmup_pixels": "none"},
        {"peer_classes": "few"},
        {"peer_refiner": "crf"},
        {"peer_target": "firm"},
    ),
    ids=str,
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(DiffsegError, match=next(iter(wrong))):
        changed(**wrong)


def test_a_mode_wants_its_number_of_networks():
    with pytest.raises(DiffsegError, match="trains 2 network"):
        train(new_networks(1, "upernet-swin-mini", CLASSES, 0), halves(), 255, changed(training_mode="cotrain"), 0)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_segmenter_maps_odd_sizes_to_logits_of_the_same_size(name):
    network = Segmenter(name, ("background", "thing", "other")).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 40, 75)).shape == (2, 3, 40, 75)


@pytest.mark.parametrize("name", ("resunet-resnet10t", "segformer-mini", "upernet-swin-mini", "mask2former-swin-mini"))
def test_a_saved_segmenter_predicts_the_same(tmp_path, name):
    network = Segmenter(name, CLASSES).eval()
    save_segmenter(network, tmp_path)
    image = torch.rand(1, 3, 64, 64)
    loaded = load_segmenter(tmp_path)
    with torch.inference_mode():
        assert torch.allclose(
            network(image), loaded(image), atol=1e-5
        )  # weights elsewhere in memory may round otherwise
    assert same(network, loaded)
    assert loaded.classes == CLASSES
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_a_saved_ensemble_is_one_module(tmp_path):
    ensemble = new_networks(2, "upernet-swin-mini", CLASSES, 0).eval()
    save_segmenter(ensemble, tmp_path)
    image = torch.rand(1, 3, 32, 32)
    loaded = load_segmenter(tmp_path)
    with torch.inference_mode():
        assert isinstance(loaded, Ensemble) and torch.allclose(ensemble(image), loaded(image), atol=1e-5)
    assert same(ensemble, loaded)


def test_mask2former_is_trained_by_pixels_and_argmax_is_semantic_inference():
    network = Segmenter("mask2former-swin-mini", CLASSES)
    image = torch.rand(1, 3, 64, 64)
    logits = network(image)
    logits.square().mean().backward()
    heads = [p for n, p in network.named_parameters() if "class_predictor" in n or "mask_embedder" in n]
    assert heads and all(parameter.grad is not None and parameter.grad.any() for parameter in heads)
    assert isinstance(network.network, FromTransformers)
    output = network.eval().network.model(pixel_values=(image - network.mean) / network.std)
    shares = output.class_queries_logits.softmax(-1)[0, :, :-1]
    scores = (shares[:, :, None, None] * output.masks_queries_logits[0].sigmoid()[:, None]).sum(0)
    small = torch.nn.functional.interpolate(network(image), scores.shape[-2:], mode="bilinear", antialias=True)
    assert (small[0].argmax(0) == scores.argmax(0)).float().mean() > 0.95


@pytest.mark.parametrize("name", ("segformer-mini", "mask2former-swin-mini"))
def test_a_folder_of_a_whole_network_trains_and_predicts(tmp_path, name):
    """The folder's network has another size than the name's and other classes, as one from the hub would have."""
    torch.manual_seed(0)
    if name == "segformer-mini":
        config = transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, num_labels=5
        )
        pretrained = transformers.SegformerForSemanticSegmentation(config)
    else:
        swin = transformers.SwinConfig(
            embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=STAGES
        )
        small = {size: 32 for size in ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward")}
        config = transformers.Mask2FormerConfig(
            backbone_config=swin, num_labels=5, num_queries=6, num_attention_heads=2, encoder_layers=1,
            encoder_feedforward_dim=16, decoder_layers=2, **small
        )  # fmt: skip
        pretrained = transformers.Mask2FormerForUniversalSegmentation(config)
    pretrained.save_pretrained(tmp_path / "hub")
    network = new_networks(1, name, CLASSES, 0, encoder_weights=str(tmp_path / "hub"))
    ours, theirs = network.network.model.state_dict(), pretrained.state_dict()
    alike = [torch.equal(value, theirs[key]) for key, value in ours.items() if value.shape == theirs[key].shape]
    assert all(alike) and len(alike) > 0.9 * len(theirs)
    history = train(network, halves(), 255, changed(iterations=20, learning_rate=5e-3), 0)
    assert np.mean(history["loss"][-5:]) < 0.8 * np.mean(history["loss"][:3])
    save_segmenter(network, tmp_path / "trained")
    image = torch.rand(2, 3, 40, 48)
    loaded = load_segmenter(tmp_path / "trained")
    assert same(network, loaded)
    # weights elsewhere in memory may round otherwise
    torch.testing.assert_close(loaded(image), network(image), rtol=1e-5, atol=1e-5)


def test_the_pretrained_encoder_is_loaded_into_every_network_and_only_there(tmp_path):
    first, second = new_networks(2, "resunet-resnet10t", CLASSES, 0, encoder_weights="mini").networks
    scratch = new_networks(2, "resunet-resnet10t", CLASSES, 0).networks[0]
    shipped = load_file(locate("encoder_weights", "mini") / "model.safetensors")
    for network in (first, second):
        for key, value in network.network.encoder.state_dict().items():
            assert torch.equal(value, shipped[key].to(value.dtype)), key
    assert same(first.network.decoder, scratch.network.decoder)
    assert not same(first.network.decoder, second.network.decoder)
    assert not same(first.network.encoder, scratch.network.encoder)
    with pytest.raises(DiffsegError, match="holds no encoder of unet-resnet18"):
        Segmenter("unet-resnet18", CLASSES, "mini")
    with pytest.raises(DiffsegError, match="holds no encoder of resunet-resnet10t"):
        Segmenter("resunet-resnet10t", CLASSES, str(tmp_path))


@pytest.mark.parametrize("name", ("fpn-resnet18", "upernet-swin-mini", "mask2former-swin-mini"))
def test_an_initial_network_gives_all_weights_but_the_last_layers(tmp_path, name):
    source = Segmenter(name, ("background", "cat", "dog"))
    save_segmenter(source, tmp_path)
    weights = source.state_dict()
    started = new_networks(2, name, CLASSES, 3, initial_network=str(tmp_path))
    for network in started.networks:
        differing = {
            key
            for key, value in network.state_dict().items()
            if value.shape != weights[key].shape or not torch.equal(value, weights[key])
        }
        assert 1 <= len(differing) <= 3 and all(weights[key].shape[0] in (3, 4) for key in differing)
    # the same number of other classes starts its last layer anew, too; the same classes keep it
    other = new_networks(1, name, ("background", "car", "bus"), 3, initial_network=str(tmp_path))
    assert not same(other, source)
    relative = os.path.relpath(tmp_path, project_root())  # counts from there, wherever a notebook runs
    assert same(new_networks(1, name, source.classes, 3, initial_network=relative), source)
    with pytest.raises(DiffsegError, match=f"set segmenter to {name}"):
        new_networks(1, "unet-resnet18", CLASSES, 0, initial_network=str(tmp_path))


def test_unknown_missing_and_truncated_segmenters_are_one_sentence(tmp_path):
    with pytest.raises(DiffsegError, match="unet-resnet99"):
        Segmenter("unet-resnet99", CLASSES)
    with pytest.raises(DiffsegError, match="upernet-swin-mini cannot be made"):
        Segmenter("upernet-swin-mini", CLASSES, str(tmp_path / "nowhere"))
    with pytest.raises(DiffsegError, match="train it again"):
        load_segmenter(tmp_path / "nowhere")
    save_segmenter(Segmenter("fpn-resnet18", CLASSES), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DiffsegError, match="train it again"):
        load_segmenter(tmp_path)


class Says(torch.nn.Module):
    """A network that is sure of one class everywhere."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        label = torch.full(images[:, 0].shape, self.k)
        return 9 * torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2).float()


def test_networks_label_what_is_pasted_together_and_go_on_training():
    def pasted(*classes: int) -> torch.Tensor:
        networks, label = [Says(k) for k in classes], torch.zeros(2, 4, 4, dtype=torch.int64)
        images, rng = torch.rand(2, 3, 4, 4), torch.Generator()
        _, _, trusted, _ = mix(networks, images, label, label.bool(), changed(mixing=1.0), 0, 255, rng)
        assert all(network.training for network in networks)
        return trusted

    assert pasted(1, 1).all() and not pasted(1, 2).any()  # where they contradict, neither is sure


def test_a_training_hands_on_which_class_is_background_and_what_was_pasted(monkeypatch):
    seen, band = [], torch.ones(4, 32, 32, dtype=torch.bool)

    def watched_mix(networks, images, label, trusted, options, background, *rest):
        seen.append(background)
        return images, label, trusted, band

    def watched_losses(logits, label, trusted, boundary, *rest):
        seen.append(boundary)
        return step_losses(logits, label, trusted, boundary, *rest)

    monkeypatch.setattr(training, "mix", watched_mix)
    monkeypatch.setattr(training, "step_losses", watched_losses)
    options = changed(training_mode="selftrain", iterations=1, warmup=0.0, mixing=0.5)
    for classes in (("road", "car"), ("road", "background")):
        train(new_networks(1, "resunet-resnet10t", classes, 0), halves(margin=True), 255, options, 0)
    assert seen[0] is None and seen[2] == 1 and seen[1] is seen[3] is band


def test_each_of_two_networks_starts_from_its_own(tmp_path):
    source = new_networks(2, "resunet-resnet10t", CLASSES, 0)
    save_segmenter(source, tmp_path)
    assert same(new_networks(2, "resunet-resnet10t", CLASSES, 1, initial_network=str(tmp_path)), source)


def test_one_network_is_no_start_for_two_that_would_stay_alike(tmp_path):
    save_segmenter(new_networks(1, "resunet-resnet10t", CLASSES, 0), tmp_path)
    with pytest.raises(DiffsegError, match="is one network, and 2 that begin alike stay alike"):
        new_networks(2, "resunet-resnet10t", CLASSES, 1, initial_network=str(tmp_path))
    first, second = new_networks(2, "resunet-resnet10t", ("road", "car"), 1, initial_network=str(tmp_path)).networks
    assert not same(first, second)  # other classes start a last layer of their own
    save_segmenter(new_networks(1, "segformer-mini", CLASSES, 0), tmp_path)
    new_networks(2, "segformer-mini", CLASSES, 1, initial_network=str(tmp_path))  # its dropout tells them apart


def test_a_folder_called_imagenet_is_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(segmenters, "locate", lambda parameter, value: tmp_path / value)
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "mine").mkdir()
    assert segmenters.encoder_folder("imagenet") is None
    assert segmenters.encoder_folder("mine") == tmp_path / "mine"


def test_a_network_sees_images_normalised_as_imagenets_and_whole():
    network, image = Segmenter("resunet-resnet10t", CLASSES), torch.rand(1, 3, 40, 75)
    network.network = torch.nn.Identity()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(network(image), (image - mean) / std, atol=1e-6)


def test_a_residual_block_without_its_body_is_its_shortcut():
    block, x = ResidualBlock(2, 2).eval(), torch.rand(1, 2, 4, 4)
    torch.nn.init.zeros_(block.body[3].weight)
    assert torch.allclose(block(x), block.shortcut(x).relu())


def test_measures_are_shares_of_the_valid_pixels():
    first, second = (torch.eye(3)[k].view(1, 3, 1, 1).expand(1, 3, 1, 4).clone() for k in (1, 2))
    second[..., 0] = first[..., 0]
    label, trusted = torch.tensor([[[1, 0, 0, 255]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    found = measures([torch.tensor(1.0)], [first, second], label, trusted, label, 255)
    assert found["contradicted"] == pytest.approx(2 / 3) == found["disagreement"]
    # an image with pasted objects counts by none but its networks
    both = [torch.cat([each, each]) for each in (first, second)]
    labels, drawn = torch.cat([label, label]), torch.cat([label, 1 - label.clamp(max=1)])
    pasted = measures([torch.tensor(1.0)], both, labels, torch.cat([trusted, ~trusted]), drawn, 255)
    assert pasted == found and found["trusted"] == 1.0
    every = measures([torch.tensor(1.0)], [first, second], label, trusted, 1 - label.clamp(max=1), 255)
    assert np.isnan(every["contradicted"]) and every["disagreement"] == found["disagreement"]


def test_the_moving_average_goes_on_after_a_stop(tmp_path):
    options = changed(iterations=4, checkpoint_every=2, ema=0.9)

    def averaged(data, **more):
        network = new_networks(1, "resunet-resnet10t", CLASSES, 0)
        train(network, data, 255, options, 0, **more)
        return network

    cut = Cut(halves())
    cut.left = 9
    with pytest.raises(KeyboardInterrupt):
        averaged(cut, checkpoint=tmp_path / "checkpoint.pt")
    assert same(averaged(halves(), checkpoint=tmp_path / "checkpoint.pt"), averaged(halves()))


def test_an_answer_is_restricted_and_then_refined_along_the_edges():
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 4, 16, 16, generator=random) for _ in range(2)]
    images, label = torch.rand(1, 3, 16, 16, generator=random), torch.zeros(1, 16, 16, dtype=torch.int64)
    trusted, named = torch.zeros(1, 16, 16, dtype=torch.bool), torch.tensor([[True, True, True, False]])
    trusted[:, :4] = True
    options = changed(training_mode="cotrain", peer_classes="image", peer_refiner="pamr")
    found = answers_of(logits, images, label, trusted, named, options, background=0)
    for own, answer in zip(logits, found, strict=True):
        narrow = cotraining.restricted(own.softmax(dim=1), named, 0)
        torch.testing.assert_close(answer, cotraining.edge_aware(narrow, images, label, trusted))
        assert not torch.allclose(answer, narrow, atol=1e-3)


def test_every_step_and_seed_pastes_by_its_own_lot(monkeypatch):
    lots = []

    def watched(networks, images, label, trusted, options, background, ignore, generator):
        lots.append((generator.initial_seed(), torch.initial_seed()))
        return images, label, trusted, torch.zeros_like(trusted)

    monkeypatch.setattr(training, "mix", watched)
    for seed in (0, 1):
        trained(halves(margin=True), changed(training_mode="selftrain", iterations=3, warmup=0.0), seed)
    assert all(len(set(each)) == 6 for each in zip(*lots, strict=True))


def test_the_share_that_receives_and_ignored_pixels_that_are_never_pasted():
    network, rng = Says(1), torch.Generator().manual_seed(0)
    images, label = torch.rand(400, 3, 2, 2), torch.zeros(400, 2, 2, dtype=torch.int64)
    *_, trusted, _ = mix([network], images, label, label.bool(), changed(mixing=0.25), 0, 255, rng)
    assert 0.17 < trusted[:, 0, 0].float().mean() < 0.33
    label = torch.stack([torch.full((2, 2), 255), torch.zeros(2, 2, dtype=torch.int64)])  # the first is padding
    mixed, _, trusted, _ = mix([network], images[:2], label, label < 0, changed(mixing=1.0), 0, 255, rng)
    assert trusted.all() and torch.equal(mixed, images[[1, 1]])  # the second keeps its pixels


def test_to_ask_the_networks_what_is_pasted_leaves_their_running_means():
    network = new_networks(1, "resunet-resnet10t", CLASSES, 0).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images, label = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    mix([network], images, label, label.bool(), changed(mixing=1.0), 0, 255, torch.Generator())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_checkpoint_is_of_its_seed_set_and_classes_and_of_any_interval(tmp_path):
    path, options = tmp_path / "checkpoint.pt", changed(iterations=1)
    _, history = trained(halves(), options, checkpoint=path)
    other = new_networks(1, "upernet-swin-mini", ("background", "other"), 0)
    for begin in (
        lambda: trained(halves(), options, seed=1, checkpoint=path),
        lambda: trained(halves(4), options, checkpoint=path),
        lambda: training.train(other, halves(), 255, options, 0, checkpoint=path),
    ):
        with pytest.raises(DiffsegError, match="other options; delete it"):
            begin()
    often = changed(iterations=1, checkpoint_every=7, workers=1)  # neither moves the key
    assert trained(halves(), often, checkpoint=path)[1] == history


def test_a_network_whose_history_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "write_rows", full)
    with pytest.raises(OSError):
        train_once(
            tmp_path / "n",
            lambda: new_networks(1, "upernet-swin-mini", CLASSES, 0),
            halves(),
            255,
            changed(iterations=1),
            0,
        )
    assert not (tmp_path / "n" / WEIGHTS).exists()


def test_a_training_has_the_threads_that_its_options_say(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train", lambda *_: seen.append(torch.get_num_threads()) or {"loss": [1.0]})
    train_once(
        tmp_path / "n",
        lambda: new_networks(1, "upernet-swin-mini", CLASSES, 0),
        halves(),
        255,
        changed(threads=torch.get_num_threads() + 1),
        0,
    )
    assert seen == [torch.get_num_threads() + 1]
