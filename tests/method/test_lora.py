"""LoRA on a tiny Stable Diffusion made of the real classes: exact round trips, resume, bad input."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_loading
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from helpers import assert_close_images, assert_equal_images
from PIL import Image
from safetensors import safe_open
from tokenizers import AddedToken
from torchmetrics.image.kid import poly_mmd
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffseg import denoising, lora, target_domain
from diffseg.errors import DiffsegError
from diffseg.files import METADATA
from diffseg.generator import draw, load_generator
from diffseg.lora import TuningOptions, load_lora, tune
from diffseg.paths import locate, project_root

CAPTIONS = ["a street with a car", "a street with a rider"]
OPTIONS = TuningOptions(height=16, width=32, rank=2, alpha=6, learning_rate=1e-2, steps=4, batch=2, checkpoint_every=2)


def tiny_pipeline(prediction: str = "v_prediction", width: int = 16) -> StableDiffusionPipeline:
    """A Stable Diffusion with random weights: 16 x 16 pictures, 8 x 8 latents."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=8)
    words = ("a", "street", "with", "car", "rider")
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=True) for word in words])
    text = CLIPTextConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(width, width), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, cross_attention_dim=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae.eval(), CLIPTextModel(text).eval(), tokenizer, unet.eval(), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(PartialState().device)  # where tuning takes it


def picture(pipeline) -> np.ndarray:
    images = draw(pipeline, CAPTIONS, [1, 2], height=16, width=32, sampling_steps=3)
    return np.stack([np.asarray(image) for image in images])


def weights(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / lora.WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of three sizes, one in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "city").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"b.png": (20, 40), "city/a.JPG": (40, 30), "c.jpeg": (16, 32)}.items():
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "readme.txt").write_text("no picture")
    return folder


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_picture_survives_saving_and_loading_and_scale_zero_is_the_base_model(tmp_path, pictures, prediction):
    pipeline = tiny_pipeline(prediction)
    base = picture(pipeline)
    losses = tune(pipeline, pictures, CAPTIONS, OPTIONS, tmp_path / "lora", seed=3)
    tuned = picture(pipeline)
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert np.abs(tuned.astype(int) - base).max() > 1  # more than rounding

    assert_equal_images(picture(pipeline), tuned)  # the same weights in memory

    fresh = tiny_pipeline(prediction)
    load_lora(fresh, tmp_path / "lora")
    assert_close_images(picture(fresh), tuned)  # alpha / rank is 3 here: it survives, or the pictures differ
    load_lora(fresh, tmp_path / "lora", scale=0)
    assert_close_images(picture(fresh), base)
    load_lora(fresh, tmp_path / "lora", scale=0.5)
    halfway = picture(fresh).astype(int)
    assert np.abs(halfway - base).max() > 1 and np.abs(halfway - tuned).max() > 1
    load_lora(pipeline, tmp_path / "lora")  # over the LoRA that tuning has left there
    assert_close_images(picture(pipeline), tuned)


def test_through_a_generator_folder_as_step_03_loads_it(tmp_path, pictures):
    tiny_pipeline().save_pretrained(tmp_path / "generator")
    pipeline = load_generator(str(tmp_path / "generator"), PartialState().device)
    tune(pipeline, pictures, CAPTIONS, OPTIONS, tmp_path / "lora")
    tuned = picture(pipeline)
    other = load_generator(str(tmp_path / "generator"), PartialState().device)
    load_lora(other, tmp_path / "lora", 1.0)
    assert_close_images(picture(other), tuned)
    other = load_generator(str(tmp_path / "generator"), PartialState().device)
    other.load_lora_weights(tmp_path / "lora")  # diffusers' own call, as any other tool loads it
    assert_close_images(picture(other), tuned)


def test_only_attention_projections_change_and_by_alpha_over_rank_times_b_a(tmp_path, pictures):
    pipeline = tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    tune(pipeline, pictures, CAPTIONS, OPTIONS, tmp_path)
    saved = weights(tmp_path)
    pipeline.fuse_lora()  # peft writes W + alpha / r B A into the layers
    pipeline.unload_lora_weights()
    for name, value in pipeline.unet.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"unet.{layer}.lora_A.weight" in saved:
            a, b = saved[f"unet.{layer}.lora_A.weight"], saved[f"unet.{layer}.lora_B.weight"]
            change = (6 / 2 * b @ a).to(value.device)
            assert torch.allclose(value, before[name] + change, atol=1e-6)
            assert layer.endswith(OPTIONS.targets) and ".attn" in layer and (b != 0).any()
        else:
            assert (value == before[name]).all()


def test_convolutions_and_feed_forward_layers_are_tuned_and_loaded(tmp_path, pictures):
    pipeline, options = tiny_pipeline(), dataclasses.replace(OPTIONS, targets=("conv1", "net.2"))
    base = picture(pipeline)
    tune(pipeline, pictures, CAPTIONS, options, tmp_path / "lora")
    tuned = picture(pipeline)
    assert np.abs(tuned.astype(int) - base).max() > 1
    layers = lora.target_layers(pipeline.unet, options.targets)
    assert {name.removeprefix("unet.").partition(".lora_")[0] for name in weights(tmp_path / "lora")} == layers.keys()
    ours, theirs = tiny_pipeline(), tiny_pipeline()
    conv1 = ours.unet.down_blocks[0].resnets[0].conv1
    assert layers["down_blocks.0.resnets.0.conv1"] == (conv1.in_channels * 9, conv1.out_channels)
    load_lora(ours, tmp_path / "lora")
    theirs.load_lora_weights(tmp_path / "lora")  # diffusers' own call
    assert_close_images(picture(ours), tuned)
    assert_close_images(picture(theirs), tuned)
    load_lora(ours, tmp_path / "lora", scale=0)
    assert_close_images(picture(ours), base)


def test_sdxl_is_tuned_and_its_lora_loaded_and_for_others_it_is_said_where_to_train(tmp_path, pictures):
    pipeline = tiny_loading.build("sdxl")
    base = tiny_loading.picture(pipeline)
    losses = tune(pipeline, pictures, ["a car", "a rider"], OPTIONS, tmp_path / "lora")
    assert len(losses) == 4 and np.isfinite(losses).all()
    fresh = tiny_loading.build("sdxl")
    load_lora(fresh, tmp_path / "lora")
    drawn = tiny_loading.picture(fresh)
    assert np.abs(drawn - tiny_loading.picture(pipeline.to("cpu"))).max() < 1e-3 < np.abs(drawn - base).max()
    with pytest.raises(
        DiffsegError, match="not FluxPipeline; train a LoRA for it with .* give its file as generator_lora"
    ):
        tune(tiny_loading.build("flux"), pictures, CAPTIONS, OPTIONS, tmp_path)


def test_settings_and_losses_on_disk(tmp_path, pictures):
    losses = tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path)
    with safe_open(tmp_path / lora.WEIGHTS, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == 6 and settings["unet.r"] == 2
    rows = list(csv.DictReader((tmp_path / lora.LOSSES).open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == losses


def test_the_rate_warms_up_and_the_average_is_what_is_left(tmp_path, pictures):
    losses, found = [], []
    for ema in (0.0, 0.5):
        options = dataclasses.replace(OPTIONS, steps=5, warmup=3, ema=ema)
        losses.append(tune(tiny_pipeline(), pictures, CAPTIONS, options, tmp_path / str(ema)))
        found.append(weights(tmp_path / str(ema)))
    assert losses[0] == losses[1]  # the average follows and does not steer
    plain, average = (sum(float(v.norm()) for k, v in each.items() if "lora_B" in k) for each in found)
    assert 0 < average < plain  # B begins at zero
    rates = [float(row["learning_rate"]) for row in csv.DictReader((tmp_path / "0.0" / lora.LOSSES).open())]
    assert rates == pytest.approx([1e-2 * min(1, k / 3) for k in range(5)], abs=1e-4)


# --------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_killed_run_that_goes_on_equals_an_uninterrupted_one(tmp_path, pictures, ema):
    options = dataclasses.replace(OPTIONS, steps=5, warmup=3, ema=ema)
    whole = tune(tiny_pipeline(), pictures, CAPTIONS, options, tmp_path / "whole")

    pipeline, calls = tiny_pipeline(), []

    def kill(*_):
        calls.append(1)
        if len(calls) == 4:  # behind the checkpoint of step 2
            raise KeyboardInterrupt

    pipeline.unet.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        tune(pipeline, pictures, CAPTIONS, options, tmp_path / "parts")
    assert not (tmp_path / "parts" / lora.WEIGHTS).exists()
    torch.manual_seed(99)  # nothing may hang on the global generators
    np.random.seed(99)
    parts = tune(tiny_pipeline(), pictures, CAPTIONS, options, tmp_path / "parts")
    assert parts == whole
    for name in (lora.WEIGHTS, lora.LOSSES):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_prolonged_by_more_steps(tmp_path, pictures):
    longer = dataclasses.replace(OPTIONS, steps=6)
    whole = tune(tiny_pipeline(), pictures, CAPTIONS, longer, tmp_path / "whole")
    first = tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "parts")
    again = tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "parts")
    assert again == first  # nothing was left to do
    assert tune(tiny_pipeline(), pictures, CAPTIONS, longer, tmp_path / "parts") == whole
    for name in (lora.WEIGHTS, lora.LOSSES):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(DiffsegError, match="has 6 steps already, more than lora_steps 4"):
        tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "parts")


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path, pictures):
    losses = tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "lora")
    other, fewer = dataclasses.replace(OPTIONS, alpha=2), target_domain.find_pictures(pictures)[:2]
    for changed in (dict(seed=1), dict(captions=["a car"]), dict(options=other), dict(pictures=fewer)):
        arguments = dict(pictures=pictures, captions=CAPTIONS, options=OPTIONS, seed=0) | changed
        with pytest.raises(DiffsegError, match="is of other images, captions, options or seed"):
            tune(tiny_pipeline(), folder=tmp_path / "lora", **arguments)
    assert tune(tiny_pipeline(), pictures.rename(tmp_path / "moved"), CAPTIONS, OPTIONS, tmp_path / "lora") == losses
    (tmp_path / "lora" / lora.CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(DiffsegError, match="is damaged; delete it"):
        tune(tiny_pipeline(), tmp_path / "moved", CAPTIONS, OPTIONS, tmp_path / "lora")


def test_gradient_checkpointing_changes_nothing_and_mixed_precision_little(tmp_path, pictures):
    plain = tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "plain")
    thrifty = dataclasses.replace(OPTIONS, gradient_checkpointing=True)
    losses = tune(tiny_pipeline(), pictures, CAPTIONS, thrifty, tmp_path / "thrifty")
    assert losses == pytest.approx(plain, rel=1e-5)
    pipeline, mixed = tiny_pipeline(), dataclasses.replace(OPTIONS, precision="bf16")
    half = tune(pipeline, pictures, CAPTIONS, mixed, tmp_path / "half")
    assert half != plain and half == pytest.approx(plain, rel=0.05)
    again = tiny_pipeline()  # notebook 02 goes on with one pipeline, candidate by candidate
    for steps in (2, 4):
        losses = tune(again, pictures, CAPTIONS, dataclasses.replace(mixed, steps=steps), tmp_path / "again")
    assert losses == half
    fresh = tiny_pipeline()
    load_lora(fresh, tmp_path / "half")
    assert_close_images(picture(fresh), picture(pipeline))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, pictures):
    """Gloo on the CPU: a batch of four, cut into two halves, and gone on with in two processes after a stop."""
    options = dataclasses.replace(OPTIONS, batch=4)
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
import test_lora as t
t.PartialState(cpu=True)  # without it accelerate makes one process of each on a machine without a GPU
for steps in (2, 4):
    options = t.dataclasses.replace(t.OPTIONS, batch=4, steps=steps)
    t.tune(t.tiny_pipeline(), Path({str(pictures)!r}), t.CAPTIONS, options, {str(tmp_path / "two")!r})
"""
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = tune(tiny_pipeline(), pictures, CAPTIONS, options, tmp_path / "one")
    rows = list(csv.DictReader((tmp_path / "two" / lora.LOSSES).open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    odd = script.replace("batch=4", "batch=3")
    (tmp_path / "script.py").write_text(odd)
    done = subprocess.run([*launch, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "lora_batch 3 must be a multiple of the 2 processes" in done.stderr


def test_the_loss_falls_on_one_picture(tmp_path):
    """At a fixed set of draws: before against after."""
    Image.new("RGB", (32, 16), (200, 40, 90)).save(tmp_path / "red.png")
    pipeline = tiny_pipeline()
    options = dataclasses.replace(OPTIONS, steps=60, rank=8, alpha=8, batch=4, caption_dropout=0)
    draws = target_domain.Draws(pipeline, [tmp_path / "red.png"], CAPTIONS, 16, 32, 0, seed=77)
    batch = send_to_device(torch.utils.data.default_collate([draws[n] for n in range(32)]), pipeline.device)
    with torch.no_grad():
        before = denoising.diffusion_loss(pipeline, pipeline.unet, batch, 5.0).item()
    tune(pipeline, tmp_path, CAPTIONS, options, tmp_path / "lora")
    with torch.no_grad():
        assert denoising.diffusion_loss(pipeline, pipeline.unet, batch, 5.0).item() < 0.95 * before


# ------------------------------------------------------------------------------------- formulas and drawing


def test_a_lora_starts_from_its_seed_alone():
    starts = []
    for state, seed in ((0, 1), (5, 1), (5, 2)):
        pipeline = tiny_pipeline()
        torch.manual_seed(state)
        parameters = lora.add_lora(pipeline, OPTIONS, seed)
        starts.append(next(p.detach() for name, p in parameters.items() if "lora_A" in name))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


@torch.no_grad()
def loss_by_hand(pipeline, items: list[dict], gamma: float) -> float:
    """The objective by diffusers' scheduler for training, one draw at a time."""
    scheduler, vae, losses = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.vae, []
    is_v = scheduler.config.prediction_type == "v_prediction"
    for item in items:
        t = torch.tensor([item["timestep"]])
        mean, logvar = vae.quant_conv(vae.encoder(item["pixels"][None])).chunk(2, dim=1)
        latents = (mean + (logvar / 2).exp() * item["posterior_noise"]) * vae.config.scaling_factor
        noise, size = item["noise"][None], tuple(item["pixels"].shape[1:])
        how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        text, more = pipeline.encode_prompt([item["caption"]], **how), {}
        if len(text) > 2:  # SDXL's pooled text and sizes
            ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, text[2].shape[1])
            more = {"added_cond_kwargs": {"text_embeds": text[2], "time_ids": ids}}
        output = pipeline.unet(scheduler.add_noise(latents, noise, t), t, text[0], **more).sample
        error = (output - (scheduler.get_velocity(latents, noise, t) if is_v else noise)).square().mean()
        snr = compute_snr(scheduler, t)
        losses.append((error * snr.clamp(max=gamma) / (snr + is_v)).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("build", [tiny_pipeline, partial(tiny_loading.build, "sdxl")], ids=["v_prediction", "sdxl"])
def test_the_first_loss_of_tuning_is_that_computed_by_hand(tmp_path, pictures, build):
    """A fresh LoRA changes nothing: it is the base model's loss on the draws 0 and 1."""
    pipeline, options = build(), dataclasses.replace(OPTIONS, steps=1, caption_dropout=0)
    draws = target_domain.Draws(pipeline, target_domain.find_pictures(pictures), CAPTIONS, 16, 32, 0, 0)
    expected = loss_by_hand(pipeline.to("cpu"), [draws[n] for n in range(options.batch)], options.snr_gamma)
    assert tune(build(), pictures, CAPTIONS, options, tmp_path / "lora") == pytest.approx([expected], rel=1e-4)


def test_size_caption_dropout_and_seed_reach_the_draws(tmp_path, pictures, monkeypatch):
    given, options = [], dataclasses.replace(OPTIONS, steps=1, caption_dropout=0.9)
    monkeypatch.setattr(lora, "Draws", lambda *args: given.append(args[3:]) or target_domain.Draws(*args))
    tune(tiny_pipeline(), pictures, CAPTIONS, options, tmp_path, seed=3)
    assert given == [(16, 32, 0.9, 3)]


def test_a_step_of_tuning_is_adamws_on_clipped_gradients_and_the_average_follows(tmp_path):
    options = dataclasses.replace(OPTIONS, ema=0.1)  # small, as the decay grows up to it, from 0 at the first step
    tuner = lora.Tuner(tiny_pipeline(), options, lora.make_accelerator(options), tmp_path / "c.pt", 0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in tuner.parameters.values()]
    slopes = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for p in copies]
    reference, average = torch.optim.AdamW(copies, 1e-2, weight_decay=0.01), copies
    for steep, decay in ((100.0, 0.0), (1e-3, 0.1), (5.0, 0.1)):
        tuner.learn(sum(steep * (p * s).sum() for p, s in zip(tuner.parameters.values(), slopes, strict=True)))
        norm = steep * torch.cat([s.flatten() for s in slopes]).norm()
        for p, s in zip(copies, slopes, strict=True):
            p.grad = steep * s / max(1.0, norm)
        reference.step()
        average = [(decay * a + (1 - decay) * p).detach() for a, p in zip(average, copies, strict=True)]
    found = [*tuner.parameters.values(), *tuner.average.shadow_params]
    for one, expected in zip(found, [*copies, *average], strict=True):
        torch.testing.assert_close(one.detach(), expected.detach(), rtol=0, atol=2e-6)


def test_sdxl_is_tuned_without_a_caption_as_it_draws_without_a_prompt(pictures):
    pipeline, seen = tiny_loading.build("sdxl"), []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[2], kwargs["added_cond_kwargs"]["text_embeds"])), with_kwargs=True
    )
    draws = target_domain.Draws(pipeline, target_domain.find_pictures(pictures), ["a car"], 16, 32, 0.5, 0)
    batch = torch.utils.data.default_collate([draws[n] for n in range(8)])
    denoising.diffusion_loss(pipeline, pipeline.unet, batch, 5.0)
    [(text, pooled)] = seen
    for k, caption in enumerate(batch["caption"]):
        assert bool(text[k].any()) == bool(pooled[k].any()) == bool(caption)
    assert {bool(caption) for caption in batch["caption"]} == {True, False}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_objective_is_that_of_diffusers_training_scheduler(prediction):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    timesteps = torch.tensor([0, 10, 500, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    noised, target = denoising.noised_and_target(latents, noise, alphas, prediction)
    assert torch.allclose(noised, scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target, noise if prediction == "epsilon" else velocity, atol=1e-6)
    snr = compute_snr(scheduler, timesteps)
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    assert torch.allclose(denoising.snr_weight(alphas, 5.0, prediction), expected, rtol=1e-4)
    assert (denoising.snr_weight(alphas, 0, prediction) == 1).all()
    with pytest.raises(DiffsegError, match="predicts 'sample'"):
        denoising.noised_and_target(latents, noise, alphas, "sample")


def test_draws_follow_from_their_number_and_show_all_pictures_equally_often(pictures):
    paths = target_domain.find_pictures(pictures)
    assert [path.name for path in paths] == ["b.png", "c.jpeg", "a.JPG"]
    draws = target_domain.Draws(tiny_pipeline(), paths, CAPTIONS, 16, 32, 0.1, seed=5)
    first, again, other = draws[7], draws[7], draws[8]
    assert all(torch.equal(first[key], again[key]) for key in ("pixels", "noise", "posterior_noise"))
    assert not torch.equal(first["noise"], other["noise"])
    assert not torch.equal(first["noise"], first["posterior_noise"])
    assert first["pixels"].shape == (3, 16, 32) and first["noise"].shape == (4, 8, 16)
    assert first["pixels"].min() >= -1 and first["pixels"].max() <= 1
    for start in (0, 3, 6):  # every round shows each picture once: c.jpeg needs no scaling
        exact = target_domain.to_tensor(Image.open(pictures / "c.jpeg"))
        assert sum(torch.equal(draws[n]["pixels"], exact) for n in range(start, start + 3)) == 1
    captions = [draws[n]["caption"] for n in range(200)]
    assert set(captions) == {"", *CAPTIONS} and 5 <= captions.count("") <= 40


def test_draws_are_at_random_and_of_their_seed(tmp_path):
    for level in (10, 90, 200):
        pixels = np.full((40, 32, 3), level, np.uint8)
        pixels[20:] += 20
        Image.fromarray(pixels).save(tmp_path / f"{level}.png")
    paths, pipeline = target_domain.find_pictures(tmp_path), tiny_pipeline()
    draws, other = (target_domain.Draws(pipeline, paths, CAPTIONS, 16, 32, 0.1, seed) for seed in (5, 6))
    items = [draws[n] for n in range(240)]
    means = [item["pixels"].mean().item() for item in items]
    shown = [min((10, 90, 200), key=lambda level: abs((mean + 1) * 127.5 - level)) for mean in means]
    rounds = {tuple(shown[n : n + 3]) for n in range(0, 240, 3)}
    assert len(rounds) == 6 and all(len(set(one)) == 3 for one in rounds)  # every order
    assert len(set(means)) > 10  # crops at many places
    steps = np.array([item["timestep"] for item in items])
    assert steps.min() < 50 and 950 < steps.max() < 1000 and abs(steps.mean() - 499.5) < 75
    for key in ("noise", "posterior_noise"):
        values = torch.stack([item[key] for item in items])
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert not torch.equal(draws[0]["noise"], other[0]["noise"])


def test_a_picture_has_its_own_caption_where_metadata_gives_one(pictures):
    paths = target_domain.find_pictures(pictures)
    by_lot = target_domain.Draws(tiny_pipeline(), paths, CAPTIONS, 16, 32, 0.1, seed=5)
    without = lora.describe(paths, CAPTIONS, OPTIONS, 0)
    named = paths[1]
    (named.parent / METADATA).write_text(json.dumps({"file_name": named.name, "text": "a rider"}) + "\n")
    draws = target_domain.Draws(tiny_pipeline(), paths, CAPTIONS, 16, 32, 0.1, seed=5)
    assert target_domain.own_captions(paths) == {named: "a rider"}
    exact = target_domain.to_tensor(Image.open(named))
    for n in range(60):  # the lots are those without captions: the same crops, noise and empty captions
        assert all(torch.equal(draws[n][key], by_lot[n][key]) for key in ("pixels", "noise"))
        own = torch.equal(draws[n]["pixels"], exact) and by_lot[n]["caption"]
        assert draws[n]["caption"] == ("a rider" if own else by_lot[n]["caption"])
    assert lora.describe(paths, CAPTIONS, OPTIONS, 0) != without  # a checkpoint of other captions is refused


def test_held_out_pictures_are_the_others(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(40)]
    tuned, kept = target_domain.hold_out(paths, 0.25, seed=3)
    assert len(kept) == 10 and sorted([*tuned, *kept]) == sorted(paths)
    assert target_domain.hold_out(paths, 0.25, seed=3) == (tuned, kept)
    assert target_domain.hold_out(paths, 0.25, seed=4) != (tuned, kept)
    assert target_domain.hold_out(paths, 0, seed=3) == (paths, [])
    for count, share in ((3, 0.25), (5, 0.25), (1, 0)):
        with pytest.raises(DiffsegError, match=f"lora_held_out={share} holds out .* of {count} target images"):
            target_domain.hold_out(paths[:count], share, seed=3)
    with pytest.raises(DiffsegError, match="lora_held_out must be at least 0 and below 1, not 1"):
        target_domain.hold_out(paths, 1, seed=3)


def test_a_relative_folder_of_target_pictures_counts_from_the_projects_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = project_root()
    assert locate("target_images", "streets") == root / "streets"
    assert locate("target_images", str(tmp_path)) == tmp_path


def test_fit_scales_to_cover_and_cuts():
    square = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[:, None, None] * 4, 64, 1).repeat(3, 2))
    for where, kept in ((0, slice(0, 16)), (1, slice(16, 32))):  # halved to 32 x 32, then 16 of 32 rows or columns
        expected = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))[kept]
        assert (np.asarray(target_domain.fit(square, 16, 32, where)) == expected).all()
        turned = target_domain.fit(square.transpose(Image.Transpose.TRANSPOSE), 32, 16, where)
        assert (np.asarray(turned).swapaxes(0, 1) == expected).all()
    assert target_domain.fit(Image.new("RGB", (7, 3)), 16, 32).size == (32, 16)


def test_pixels_are_those_that_diffusers_gives_the_vae(pictures):
    picture = Image.open(pictures / "c.jpeg")
    expected = tiny_pipeline().image_processor.preprocess(picture)[0]
    torch.testing.assert_close(target_domain.to_tensor(picture), expected, rtol=0, atol=1e-6)


def test_captions_from_templates_and_words():
    templates = ["a street with {}", "a street", "a street"]
    assert target_domain.build_captions(templates, ["car", "open car"]) == [
        "a street with a car",
        "a street with an open car",
        "a street",
    ]
    with pytest.raises(DiffsegError, match="needs words"):
        target_domain.build_captions(["a street with {}"])
    with pytest.raises(DiffsegError, match="lora_captions is empty"):
        target_domain.build_captions([])


def test_kernel_distance_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    b = torch.randn(14, 12, generator=generator, dtype=torch.float64) + 1
    c = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    assert target_domain.kernel_distance(a, c) == pytest.approx(poly_mmd(a, c, degree=3, coef=1.0).item())
    assert target_domain.kernel_distance(a, b) > abs(target_domain.kernel_distance(a, c))
    assert target_domain.kernel_distance(a, b) == pytest.approx(target_domain.kernel_distance(b, a))
    with pytest.raises(DiffsegError, match="at least two"):
        target_domain.kernel_distance(a, b[:1])


def test_latent_features_describe_each_picture_alone():
    pipeline = tiny_pipeline()
    images = [Image.new("RGB", (32, 16), color) for color in ("red", "blue", "white")]
    features = target_domain.latent_features(pipeline, images)
    assert features.shape == (3, 2 * 4 * 16) and features.isfinite().all()
    assert torch.equal(features[1:], target_domain.latent_features(pipeline, images[1:]))
    assert not torch.equal(features[0], features[1])


def test_latent_features_are_the_mean_and_spread_of_each_cell(pictures):
    pipeline, picture = tiny_pipeline().to("cpu"), Image.open(pictures / "c.jpeg")  # 8 x 16 latents, cells of 2 x 4
    with torch.no_grad():
        latent = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist.mode()[0]
    cells = (pipeline.vae.config.scaling_factor * latent.double()).numpy().reshape(4, 4, 2, 4, 4)
    expected = np.concatenate([cells.mean(axis=(2, 4)), cells.std(axis=(2, 4))]).ravel()
    np.testing.assert_allclose(target_domain.latent_features(pipeline, [picture])[0], expected, rtol=1e-2, atol=1e-5)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path, pictures):
    wild = dataclasses.replace(OPTIONS, steps=8)
    pipeline, calls = tiny_pipeline(), []

    def spoil(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 5 else output

    hook = pipeline.unet.conv_out.register_forward_hook(spoil)
    with pytest.raises(DiffsegError, match="loss is not finite at step 5 of 8; .*or set lora_steps to 4"):
        tune(pipeline, pictures, CAPTIONS, wild, tmp_path / "lora")
    hook.remove()
    state = torch.load(tmp_path / "lora" / lora.CHECKPOINT, weights_only=True)
    assert len(state["rows"]) == 4 and all(value.isfinite().all() for value in state["lora"].values())
    assert len((tmp_path / "lora" / lora.LOSSES).read_text().splitlines()) == 5
    assert not (tmp_path / "lora" / lora.WEIGHTS).exists()
    kept = tune(pipeline, pictures, CAPTIONS, OPTIONS, tmp_path / "lora")  # the remedy: keep 4 steps
    assert kept == tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "other")


def test_an_infinite_learning_rate_ends_in_one_sentence(tmp_path, pictures):
    wild = dataclasses.replace(OPTIONS, learning_rate=1e30)
    with pytest.raises(DiffsegError, match=r"not finite at step 2 of 4; lower lora_learning_rate\.$"):
        tune(tiny_pipeline(), pictures, CAPTIONS, wild, tmp_path / "lora")
    assert not (tmp_path / "lora" / lora.CHECKPOINT).exists()


def test_bad_folders_and_pictures(tmp_path, pictures):
    with pytest.raises(DiffsegError, match="there is no folder .*nowhere"):
        target_domain.find_pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffsegError, match="empty holds no image"):
        target_domain.find_pictures(tmp_path / "empty")
    whole = (pictures / "city" / "a.JPG").read_bytes()
    (pictures / "city" / "a.JPG").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffsegError, match="a.JPG is truncated or no image"):
        tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "lora")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (dict(rank=0), "lora_rank must be above 0"),
        (dict(rank=17), "the LoRA rank 17 does not fit: the smallest tuned layer has 16"),
        (dict(targets=("to_x",)), "no layer of the UNet is called 'to_x'; there are .*conv1, .*to_out.0, to_q"),
        (dict(targets=()), "lora_targets must be a list with a layer at least"),
        (dict(height=15), "lora_height must be a multiple of 2 .*, not 15"),
        (dict(precision="half"), "must be fp32, fp16 or bf16, not 'half'"),
        (dict(learning_rate=0.0), "lora_learning_rate must be above 0"),
        (dict(caption_dropout=1.0), "lora_caption_dropout must be at least 0 and below 1"),
        (dict(snr_gamma=-1.0), "lora_snr_gamma must be 0 or above"),
    ],
)
def test_bad_options(tmp_path, pictures, changed, sentence):
    with pytest.raises(DiffsegError, match=sentence):
        tune(tiny_pipeline(), pictures, CAPTIONS, dataclasses.replace(OPTIONS, **changed), tmp_path / "lora")


def test_half_precision_needs_a_gpu_and_captions_are_needed(tmp_path, pictures):
    if not torch.cuda.is_available():
        half = dataclasses.replace(OPTIONS, precision="fp16")
        with pytest.raises(DiffsegError, match="lora_precision fp16 needs a GPU"):
            tune(tiny_pipeline(), pictures, CAPTIONS, half, tmp_path)
    with pytest.raises(DiffsegError, match="captions must be one or more texts"):
        tune(tiny_pipeline(), pictures, [], OPTIONS, tmp_path)


def test_a_lora_that_is_absent_damaged_or_of_another_base_model(tmp_path, pictures):
    with pytest.raises(DiffsegError, match="there is no LoRA"):
        load_lora(tiny_pipeline(), tmp_path)
    tune(tiny_pipeline(), pictures, CAPTIONS, OPTIONS, tmp_path / "lora")
    wider = tiny_pipeline(width=32)
    base = picture(wider)
    with pytest.raises(DiffsegError, match=r"is of another base model \(.* has 32 inputs, the LoRA's 16\)"):
        load_lora(wider, tmp_path / "lora")
    assert_equal_images(picture(wider), base)  # refused before anything was touched
    shutil.copytree(tmp_path / "lora", tmp_path / "bad")
    (tmp_path / "bad" / lora.WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(DiffsegError, match="is damaged"):
        load_lora(tiny_pipeline(), tmp_path / "bad")
