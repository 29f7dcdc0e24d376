"""What does a generator know before it can draw? Numbers on drawn scenes that it has not seen.

After a short training all pictures are blobs, whatever the recipe, and an oracle cannot rank blobs. But the objective
on new scenes falls from the first step on, and the attention finds objects in a noised scene long before the generator
draws them. So these rank recipes that were trained for minutes.

Such a scene has a true mask. So refiners can be judged here, too, without an oracle's own errors along the edges.
"""

import numpy as np
import torch

from diffseg.attention import AttentionRecorder
from diffseg.denoising import diffusion_loss, noised_and_target
from diffseg.experiments.generator.asked import Asked, scene_of
from diffseg.experiments.generator.pretrain import load_images, psnr_of
from diffseg.masks import class_scores, label_and_margin
from diffseg.miniworld.oracle import CLASS_IDS
from diffseg.refiners import get_refiner
from diffseg.tokens import token_positions

# Our choices.
LEVELS = 8  # noise levels at which the objective is taken of each scene
GAMMA = 5.0  # the training's own min-SNR weight: with it velocity and noise have the same objective
TIMESTEP = 250  # of 1000, at which attention is read: a quarter of the way, where objects can still be seen
BATCH = 32


def iou(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the IoU of two bool maps; 0 where both are empty."""
    union = (mask | truth).sum().item()
    return (mask & truth).sum().item() / union if union else 0.0


@torch.no_grad()
def held_out(
    pipeline, asked: list[Asked], beta: float, seed: int, refiners: tuple[str, ...] = ("none",)
) -> dict[str, float]:
    """Return what a generator makes of the scenes that the prompts describe, drawn by `asked.scene_of`.

    psnr: in dB, of the scenes after the VAE has encoded and decoded them. loss: the training's objective, over all
    noise levels; it compares generators of one VAE and noise schedule. mask_iou (0..1): of each object's true mask
    with the mask that is cut, with `beta`, from the 16 x 16 attention to its word in the noised scene, before any
    refiner; the mean over a scene's objects, then over scenes. mask_iou_pamr and so on: the same after a refiner,
    which sees the scene without noise. The noise follows from the seed.
    """
    refine = {name: get_refiner(name, "mini", device=pipeline.device) for name in refiners}
    scenes = [scene_of(one, seed) for one in asked]
    images = np.stack([scene.image for scene in scenes])
    noises = torch.Generator().manual_seed(seed)
    errors, losses, ious = [], [], {name: [] for name in refiners}
    for start in range(0, len(asked), BATCH):
        part = slice(start, min(start + BATCH, len(asked)))
        prompts = [one.prompt for one in asked[part]]
        captions = [prompt.prompt for prompt in prompts]
        pixels = load_images(images, np.arange(part.start, part.stop)).to(pipeline.device)
        encoded = pipeline.vae.encode(pixels).latent_dist.mean
        errors += (pipeline.vae.decode(encoded).sample.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3)).tolist()
        latents = encoded * pipeline.vae.config.scaling_factor
        for level in range(LEVELS):
            # each scene at other levels than its neighbours, all levels equally often
            timesteps = (torch.arange(len(prompts)) * 1000 // len(prompts) + level * 1000 // LEVELS) % 1000
            batch = {"pixels": pixels, "caption": captions, "timestep": timesteps.to(pipeline.device)}
            batch["noise"] = torch.randn(latents.shape, generator=noises).to(pipeline.device)
            batch["posterior_noise"] = torch.zeros_like(latents)
            losses.append(diffusion_loss(pipeline, pipeline.unet, batch, GAMMA).item() * len(prompts))
        noise = torch.randn(latents.shape, generator=noises).to(pipeline.device)
        alphas = pipeline.scheduler.alphas_cumprod.to(pipeline.device)[[TIMESTEP] * len(prompts)]
        noised, _ = noised_and_target(latents, noise, alphas, pipeline.scheduler.config.prediction_type)
        tokens = [token_positions(pipeline.tokenizer, prompt.prompt, prompt.spans) for prompt in prompts]
        with AttentionRecorder(pipeline, tokens, (16,)) as recorder:
            pipeline(captions, latents=noised, timesteps=[TIMESTEP], guidance_scale=1.0, output_type="latent")
        for prompt, image, scene, maps in zip(prompts, pixels.cpu(), scenes[part], recorder.maps(), strict=True):
            truth = torch.from_numpy(scene.label(CLASS_IDS))
            ids = [CLASS_IDS[name] for name in prompt.classes]
            named, scores = class_scores(maps, ids, tuple(truth.shape))
            for name, refiner in refine.items():
                label, _ = label_and_margin(named, refiner(image / 2 + 0.5, scores, beta))
                ious[name].append(np.mean([iou(label == i, truth == i) for i in ids]))
    found = {"psnr": psnr_of(np.mean(errors)), "loss": sum(losses) / len(asked) / LEVELS}
    return found | {f"mask_iou_{name}".removesuffix("_none"): float(np.mean(each)) for name, each in ious.items()}
