"""Controlled comparisons of the mini generator: what differs between rows, and that rows are measured once."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers import TINY_GENERATOR as TINY

from diffseg.denoising import diffusion_loss
from diffseg.errors import DiffsegError
from diffseg.experiments.generator import compare, heldout, networks, pretrain
from diffseg.experiments.generator.asked import pair_prompts, single_prompts
from diffseg.experiments.generator.compare import COLUMNS, VARIANTS, Sampling, find_row, grid
from diffseg.experiments.generator.heldout import held_out
from diffseg.generator import load_generator, locate_generator
from diffseg.miniworld import scenes
from diffseg.synthesis import SynthesisOptions


@pytest.fixture
def quick(monkeypatch):
    """Two denoising steps as the default, and no sheets."""
    monkeypatch.setattr(pretrain, "draw_sheet", lambda *_: None)
    monkeypatch.setattr(Sampling.__init__, "__defaults__", ("dpm++", 2, 4.0))


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------- sampling


def test_the_default_is_that_of_measure_but_for_the_papers_beta():
    assert Sampling().options() == SynthesisOptions(64, 64, 8, 4.0, (16,), "4-7", 0.2, "none")


def test_the_grid_begins_with_single_changes():
    every = grid(["ddim", "dpm++ trailing"], [6, 8], [4.0, 8.0])
    assert every[0] == Sampling() and len(set(every)) == 8
    assert set(every[1:4]) == {Sampling(steps=6), Sampling(guidance=8.0), Sampling("ddim")}
    assert every[-1] == Sampling("ddim", 6, 8.0)


def test_schedulers_do_not_depend_on_the_one_before(mini_pipeline):
    shipped = dict(load_generator("mini").scheduler.config)
    folder = locate_generator("mini")
    for name in (*compare.SCHEDULERS, *reversed(compare.SCHEDULERS)):
        Sampling(name).apply(mini_pipeline)
        mini_pipeline.scheduler.set_timesteps(12)
        steps = mini_pipeline.scheduler.timesteps.tolist()
        if name == "dpm++ trailing":
            ours = mini_pipeline.scheduler.config
            assert all(ours[key] == value for key, value in shipped.items())
        elif name == "ddim":
            plain = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="leading")
            assert all(mini_pipeline.scheduler.config[key] == value for key, value in plain.config.items())
        assert (steps[0] == 999) == (name == "dpm++ trailing")


def test_rows_are_measured_once_and_stay_as_they_are(quick, tmp_path):
    arguments = ["sampling", "--results", str(tmp_path), "--device", "cpu", "--pictures", "2", "--pairs", "2"]
    arguments += ["--schedulers", "dpm++", "--steps", "2"]
    compare.main([*arguments, "--guidance", "4"])
    path = tmp_path / "tables" / "generator_sampling.csv"
    first = rows_of(path)
    compare.main([*arguments, "--guidance", "2", "4"])
    second = rows_of(path)
    assert second[0] == first[0] and [row["guidance"] for row in second] == ["4.0", "2.0"]  # its seconds, too
    assert set(COLUMNS) < second[0].keys() and 0 <= float(second[1]["mask_iou"]) <= 1
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["made_from"]["oracle"].keys() == {"model.safetensors"} and len(about["made_from"]["generator"]) == 3
    with pytest.raises(DiffsegError, match="other pairs; move it away"):
        compare.main([*arguments, "--guidance", "6", "--pairs", "1"])
    assert rows_of(path) == second


def test_few_pictures_are_spread_over_all_words():
    options = compare.parse_options(["sampling", "--pictures", "20", "--pairs", "3", "--device", "cpu"])
    judge = compare.make_judge(options)
    assert len({one.prompt.classes[0] for one in judge.singles}) >= 15 and len(judge.pairs) == 3
    options.pictures = 105
    assert len({one.prompt.words for one in compare.make_judge(options).singles}) == 105


# ------------------------------------------------------------------------------------------- training


def settings_of(changes: dict) -> dict:
    """Return every setting of a variant's networks and scheduler, and the rest of what it changes."""
    with torch.device("meta"):
        made = {
            "text_encoder": networks.build_text_encoder(200, **changes.get("text_encoder", {})).config.to_dict(),
            "unet": networks.build_unet(**changes.get("unet", {})).config,
            "vae": networks.build_vae(**changes.get("vae", {})).config,
        }
    made["scheduler"] = networks.build_scheduler(**changes.get("scheduler", {})).config
    rest = {name: value for name, value in changes.items() if name not in made}
    return {(part, name): value for part, settings in made.items() for name, value in settings.items()} | {
        ("", name): value for name, value in rest.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_differs_from_the_base_in_one_thing(name):
    base, other = settings_of({}), settings_of(VARIANTS[name])
    changed = {key for key in base | other if base.get(key) != other.get(key)}
    if "attention" in name:  # the types of blocks of both halves of the UNet
        assert changed == {("unet", "down_block_types"), ("unet", "up_block_types")}
        kinds = other["unet", "down_block_types"], other["unet", "up_block_types"][::-1]
        assert ["Cross" in kind for kind in kinds[0]] == ["Cross" in kind for kind in kinds[1]]
    elif "channels" in name:  # the UNet reads and writes what the VAE makes
        assert changed == {("unet", "in_channels"), ("unet", "out_channels"), ("vae", "latent_channels")}
        assert len({other[key] for key in changed}) == 1
    elif name == "VAE trained anew":
        assert not changed and "vae" in VARIANTS[name]
    else:
        assert len(changed) == (0 if name in ("base", "base again") else 1)


def test_variants_have_the_sizes_that_they_say():
    def parameters(name: str) -> int:
        return sum(p.numel() for p in networks.build_unet(**VARIANTS[name].get("unet", {})).parameters())

    with torch.device("meta"):
        count = {name: parameters(name) for name in VARIANTS}
    assert count["UNet 0.75 as wide"] < 0.7 * count["base"] and count["UNet 1.5 times as wide"] > 1.8 * count["base"]
    assert count["no attention at 8 x 8"] < count["base"] < count["attention at 4 x 4"]
    assert count["cosine noise"] == count["base"]


def make_corpus(folder) -> list[scenes.Scene]:
    drawn = [scenes.sample_scene(np.random.default_rng(k), pair_share=0.6) for k in range(40)]
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(40, 8, 16, 16)).astype(np.float16))
    (folder / "captions.json").write_text(json.dumps([scene.caption for scene in drawn]))
    networks.build_vae().save_pretrained(folder / "vae" / "vae")
    return drawn


def test_a_corpus_of_fewer_pairs_keeps_latents_and_captions_together(tmp_path):
    drawn = make_corpus(tmp_path)
    folder = compare.corpus_of_pair_share(tmp_path, tmp_path / "fewer", 0.3)
    captions, latents = json.loads((folder / "captions.json").read_text()), np.load(folder / "latents.npy")
    pairs = {scene.caption for scene in drawn if len(scene.objects) == 2}
    assert sum(caption not in pairs for caption in captions) == sum(len(scene.objects) == 1 for scene in drawn)
    assert sum(caption in pairs for caption in captions) / len(captions) == pytest.approx(0.3, abs=0.03)
    every, whole = [scene.caption for scene in drawn], np.load(tmp_path / "latents.npy")
    assert all(np.array_equal(latent, whole[every.index(c)]) for c, latent in zip(captions, latents, strict=True))
    assert (folder / "vae" / "vae").is_dir()


def train(folder, *variants: str) -> list[dict]:
    """Train and judge variants on the corpus in a folder; return the rows of the table."""
    arguments = ["training", "--results", str(folder), "--device", "cpu", "--pictures", "2", "--pairs", "1"]
    arguments += ["--corpus", str(folder), "--folder", str(folder / "trials"), "--batch", "2", "--samples", "6"]
    compare.main([*arguments, "--variants", *variants])
    return rows_of(folder / "tables" / "generator_training_6.csv")


@pytest.mark.slow
def test_variants_get_equally_many_samples_and_are_trained_once(quick, tmp_path, monkeypatch):
    tiny = {"base": TINY, "epsilon": TINY | VARIANTS["epsilon"], "pair share 0.3": TINY | VARIANTS["pair share 0.3"]}
    monkeypatch.setattr(compare, "VARIANTS", tiny)
    make_corpus(tmp_path)
    first = train(tmp_path, "base", "epsilon")
    rows = train(tmp_path, "epsilon", "pair share 0.3")
    assert [row["variant"] for row in rows] == ["shipped", "base", "epsilon", "pair share 0.3"]
    assert rows[:3] == first and {row["samples"] for row in rows[1:]} == {"6"} and int(rows[0]["samples"]) > 100_000
    assert all(float(row["loss_scenes"]) > 0 and 0 <= float(row["mask_iou_scenes"]) <= 1 for row in rows)
    assert (
        load_generator(str(tmp_path / "trials" / "epsilon" / "weights")).scheduler.config.prediction_type == "epsilon"
    )
    assert find_row(rows, {"variant": "base"})["parameters"] == rows[2]["parameters"]


@pytest.mark.slow
def test_a_variant_of_another_vae_is_trained_on_its_latents(quick, tmp_path, monkeypatch):
    four = VARIANTS["latents of 4 channels"]
    tiny = TINY | four | {"unet": TINY["unet"] | four["unet"]}
    monkeypatch.setattr(compare, "VARIANTS", {"four": tiny, "twice": TINY | {"samples": 2}})
    drawn = make_corpus(tmp_path)
    np.save(tmp_path / "images.npy", np.stack([scene.image for scene in drawn]))
    before = (tmp_path / "latents.npy").read_bytes()
    rows = train(tmp_path, "four", "twice")
    assert [row["samples"] for row in rows[1:]] == ["6", "12"]
    assert (tmp_path / "latents.npy").read_bytes() == before  # the corpus of the other variants
    assert np.load(tmp_path / "trials" / "four" / "corpus" / "latents.npy").shape == (40, 4, 16, 16)
    made = load_generator(str(tmp_path / "trials" / "four" / "weights"))
    assert made.vae.config.latent_channels == made.unet.config.in_channels == 4


@pytest.mark.slow
def test_a_training_of_the_same_recipe_and_seed_repeats(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "VARIANTS", {"base": TINY, "base again": TINY, "other seed": TINY | {"seed": 1}})
    make_corpus(tmp_path)
    base, again, other = [
        {name: value for name, value in row.items() if name.endswith("_scenes")}
        for row in train(tmp_path, "base", "base again", "other seed")[1:]
    ]
    assert base == again != other


# ------------------------------------------------------------------------------------------- held-out scenes


@pytest.mark.slow
def test_held_out_numbers_know_a_trained_generator_from_its_untrained_self(mini_pipeline, monkeypatch):
    """The shipped generator, and the same with the words' meaning taken away: a new text encoder."""
    asked = single_prompts(16, 0)
    trained = held_out(mini_pipeline, asked, compare.BETA, 0)
    assert trained == held_out(mini_pipeline, asked, compare.BETA, 0)
    assert trained["mask_iou"] > 0.5 and 24 < trained["psnr"] < 30
    torch.manual_seed(0)
    stranger = networks.build_text_encoder(len(mini_pipeline.tokenizer)).eval()
    monkeypatch.setattr(mini_pipeline, "text_encoder", stranger)
    untrained = held_out(mini_pipeline, asked, compare.BETA, 0)
    assert untrained["loss"] > 1.2 * trained["loss"] and untrained["mask_iou"] < trained["mask_iou"] - 0.2


def test_the_small_sam_comes_nearer_to_the_true_masks(mini_pipeline):
    """By eight points at least, of one object and of two; PAMR by less."""
    for asked in (single_prompts(12, 3), pair_prompts(12, 3)):
        found = held_out(mini_pipeline, asked, 0.4, 0, ("none", "pamr", "sam"))
        assert found["mask_iou"] < found["mask_iou_pamr"] < found["mask_iou_sam"]
        assert found["mask_iou_sam"] > found["mask_iou"] + 0.08


def test_the_held_out_loss_of_an_idle_network_is_known(mini_pipeline, monkeypatch):
    """Of one that answers 0, it is the weighted mean square of the velocity."""
    asked = single_prompts(8, 0)
    drawn = []

    class Idle(torch.nn.Module):
        def forward(self, noised, timestep, text):
            drawn.append((noised, timestep))
            return SimpleNamespace(sample=torch.zeros_like(noised))

    def loss(pipeline, unet, batch, gamma):
        return diffusion_loss(pipeline, Idle(), batch, gamma)

    monkeypatch.setattr(heldout, "diffusion_loss", loss)
    found = held_out(mini_pipeline, asked, compare.BETA, 0)["loss"]
    timesteps = torch.cat([t for _, t in drawn])
    # every eighth of the noise levels is met equally often
    assert torch.bincount(timesteps * 8 // 1000, minlength=8).tolist() == [8] * 8
    snr = (lambda a: a / (1 - a))(mini_pipeline.scheduler.alphas_cumprod[timesteps])
    # latents have variance of about 1, and so has the velocity
    assert found == pytest.approx((snr.clamp(max=5) / (snr + 1)).mean().item(), rel=0.25)


def test_a_folder_without_latents_is_named(tmp_path):
    with pytest.raises(DiffsegError, match="there are no latents"):
        compare.main(["training", "--corpus", str(tmp_path), "--results", str(tmp_path)])
