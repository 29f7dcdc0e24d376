"""The objective that a generator is trained by, and tuned: the squared error of the predicted noise or velocity."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from diffseg.errors import DiffsegError


def noised_and_target(
    latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noised latents, and what the UNet shall predict: the noise (Ho et al. 2020) or the velocity
    (Salimans & Ho 2022). alphas: cumulative alpha of each image's timestep (B), the rest B x C x h x w."""
    a = alphas.view(-1, 1, 1, 1)
    noised = a.sqrt() * latents + (1 - a).sqrt() * noise
    if prediction == "epsilon":
        return noised, noise
    if prediction == "v_prediction":
        return noised, a.sqrt() * noise - (1 - a).sqrt() * latents
    raise DiffsegError(f"the generator predicts {prediction!r}; tuning knows epsilon and v_prediction.")


def snr_weight(alphas: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Return min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v, 1 for gamma 0 (all: B)."""
    if gamma == 0:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # the same, and 1 rather than 0 / 0 where the signal is gone
    return snr.clamp(max=gamma) / (snr + 1)


def diffusion_loss(pipeline, unet: Callable, batch: dict, snr_gamma: float) -> torch.Tensor:
    """Return the mean weighted squared error of one batch of draws (a float32 scalar)."""
    vae, dtype, prediction = pipeline.vae, pipeline.vae.dtype, pipeline.scheduler.config.prediction_type
    with torch.no_grad():
        posterior = vae.encode(batch["pixels"].to(dtype)).latent_dist
        latents = posterior.mean + posterior.std * batch["posterior_noise"]
        latents = latents.float() * vae.config.scaling_factor
        text, *pooled = pipeline.encode_prompt(
            batch["caption"], device=latents.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipeline.config.get("force_zeros_for_empty_prompt"):  # SDXL draws without a prompt by zeros, not by ""
            told = text.new_tensor([bool(caption) for caption in batch["caption"]])
            text, pooled[1] = text * told.view(-1, 1, 1), pooled[1] * told.view(-1, 1)
    alphas = pipeline.scheduler.alphas_cumprod.to(latents.device)[batch["timestep"]]
    noised, target = noised_and_target(latents, batch["noise"], alphas, prediction)
    more = {}
    if len(pooled) > 1:  # SDXL reads a pooled text too, and the sizes before and after a crop, and where it was cut
        height, width = batch["pixels"].shape[-2:]
        sizes = text.new_tensor([[height, width, 0, 0, height, width]]).expand(len(text), -1)
        more = {"added_cond_kwargs": {"text_embeds": pooled[1], "time_ids": sizes}}
    output = unet(noised.to(dtype), batch["timestep"], text, **more).sample
    error = F.mse_loss(output.float(), target, reduction="none").mean((1, 2, 3))
    return (snr_weight(alphas, snr_gamma, prediction) * error).mean()
