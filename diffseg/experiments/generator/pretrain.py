"""Train the mini generator from nothing: a small Stable Diffusion on pictures and captions, never on masks.

Stages, each a command that continues where it was stopped:

    python -m diffseg.experiments.generator.pretrain corpus  scenes and captions, kept as two files
    python -m diffseg.experiments.generator.pretrain vae  AutoencoderKL: 64 x 64 x 3 <-> 16 x 16 x 8 latents
    python -m diffseg.experiments.generator.pretrain diffusion  CLIPTextModel and UNet2DConditionModel on cached latents
    python -m diffseg.experiments.generator.pretrain decoder  the VAE's decoder alone, longer (sharper edges)
    python -m diffseg.experiments.generator.pretrain export  the Stable Diffusion folder that the package ships

To go on from a finished generator with a fresh optimizer, on other scenes than it has seen: `corpus --seed 1`, then
with `--initial mini` the stages `latents` (in place of `vae`: the generator's own encodes), `diffusion` and `export`.

The recipe is our choice throughout: small networks of the real diffusers and transformers classes, v-prediction
(Salimans & Ho 2022) with min-SNR weights (Hang et al. 2023), 10 % empty captions for classifier-free guidance.
`changes` is what `diffseg.experiments.generator.compare` alters: settings of the VAE, or network ("text_encoder",
"unet", "scheduler") -> settings.
"""

import argparse
import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from diffseg.denoising import noised_and_target, snr_weight
from diffseg.experiments.generator.networks import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from diffseg.experiments.trainer import Trainer, mixed_precision, parser_of, training_note
from diffseg.files import atomic_path, write_text
from diffseg.generator import load_generator, locate_generator
from diffseg.miniworld.scenes import PLACES, load_pictures, sample_scene
from diffseg.seeds import derive_seed

# ---------------------------------------------------------------------------------------------- corpus


def draw_corpus_part(seed: int, pair_share: float, start: int, stop: int) -> tuple[np.ndarray, list[str]]:
    rngs = [np.random.default_rng(derive_seed(seed, "corpus", i)) for i in range(start, stop)]
    scenes = [sample_scene(rng, pair_share=pair_share) for rng in rngs]
    return np.stack([scene.image for scene in scenes]), [scene.caption for scene in scenes]


def make_corpus(folder: Path, scenes: int, pair_share: float, seed: int, workers: int) -> None:
    """Write images.npy (uint8 N x 64 x 64 x 3) and captions.json; the masks are thrown away here."""
    part = 1000
    starts = range(0, scenes, part)
    stops = [min(start + part, scenes) for start in starts]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(draw_corpus_part, seed, pair_share), starts, stops)
        parts = list(tqdm(results, "drawing scenes", total=len(starts), unit="k"))
    with atomic_path(folder / "images.npy") as path:
        np.save(path, np.concatenate([images for images, _ in parts]))
    write_text(folder / "captions.json", json.dumps([caption for _, captions in parts for caption in captions]))


def load_images(images: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Return float B x 3 x 64 x 64 in -1..1."""
    return torch.from_numpy(images[np.sort(rows)]).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_of(error: float) -> float:
    """Return the peak signal-to-noise ratio, in dB, of a mean square error of pictures in -1..1."""
    return float(-10 * np.log10(error / 4))  # the range is 2


# ---------------------------------------------------------------------------------------------- stages


def train_vae(folder: Path, corpus: Path, options: argparse.Namespace, changes: dict | None = None) -> None:
    """Mean absolute error plus a small Kullback-Leibler term; then cache the latents of the whole corpus."""
    device = torch.device(options.device)
    images = np.load(corpus / "images.npy", mmap_mode="r")
    torch.manual_seed(options.seed)
    vae = build_vae(**changes or {}).to(device)
    trainer = Trainer(folder, {"vae": vae}, options.rate, 0.995, options.precision)

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        x = load_images(images, rng.integers(len(images), size=options.batch)).to(device)
        with mixed_precision(device, options.precision):
            posterior = vae.encode(x).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float())
        return F.l1_loss(output.float(), x) + F.mse_loss(output.float(), x) + 1e-4 * kl.mean()

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every)
    trainer.load_average()
    latents, psnr = encode(vae.eval(), images)
    vae.register_to_config(scaling_factor=float(1 / latents[:4096].astype(np.float32).std()))
    save_latents(vae, latents, corpus)
    note = {"psnr": psnr, "samples": trainer.samples, "seconds": trainer.seconds}
    (folder / "vae.json").write_text(json.dumps(note))
    print(note, vae.config.scaling_factor)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a corpus's latents (float16 N x 8 x 16 x 16, not scaled), and the PSNR of its first 1,024 pictures."""
    latents, error = [], []
    for start in tqdm(range(0, len(images), 256), "caching latents"):
        x = load_images(images, np.arange(start, min(start + 256, len(images)))).to(vae.device)
        z = vae.encode(x).latent_dist.mean
        latents.append(z.half().cpu().numpy())
        if start < 1024:
            error.append(F.mse_loss(vae.decode(z).sample.clamp(-1, 1), x).item())
    return np.concatenate(latents), psnr_of(np.mean(error))


def save_latents(vae: AutoencoderKL, latents: np.ndarray, corpus: Path) -> None:
    """Write the VAE and, scaled by its factor, latents.npy."""
    vae.save_pretrained(corpus / "vae" / "vae")
    with atomic_path(corpus / "latents.npy") as path:
        np.save(path, latents * np.float16(vae.config.scaling_factor))


def encode_corpus(corpus: Path, options: argparse.Namespace) -> None:
    """Cache the corpus's latents by the VAE of the generator `options.initial`, and note how it came to be."""
    vae = load_generator(options.initial, options.device).vae
    latents, psnr = encode(vae.eval(), np.load(corpus / "images.npy", mmap_mode="r"))
    save_latents(vae, latents, corpus)
    (corpus / "vae" / "vae.json").write_text(json.dumps({"psnr": psnr, "of": options.initial}))


def train_diffusion(folder: Path, corpus: Path, options: argparse.Namespace, changes: dict | None = None) -> None:
    """v-prediction on cached latents with min-SNR weights; text encoder and UNet are trained together."""
    changes = changes or {}
    device = torch.device(options.device)
    latents = torch.from_numpy(np.load(corpus / "latents.npy"))
    if device.type == "cuda":
        latents = latents.to(device)  # some hundred megabytes, read at random in every step
    tokenizer = build_tokenizer()
    captions = json.loads((corpus / "captions.json").read_text())
    ids = tokenizer(captions, padding="max_length", return_tensors="np").input_ids
    empty = tokenizer("", padding="max_length", return_tensors="np").input_ids[0]
    torch.manual_seed(options.seed)
    text_encoder = build_text_encoder(len(tokenizer), **changes.get("text_encoder", {})).to(device)
    unet = build_unet(**changes.get("unet", {})).to(device).to(memory_format=torch.channels_last)
    if options.initial:
        initial = load_generator(options.initial)
        text_encoder.load_state_dict(initial.text_encoder.state_dict())
        unet.load_state_dict(initial.unet.state_dict())
    scheduler = build_scheduler(**changes.get("scheduler", {}))
    alphas, prediction = scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type
    modules = {"text_encoder": text_encoder, "unet": unet}
    trainer = Trainer(folder, modules, options.rate, options.decay, options.precision, options.compile)
    if options.compile:
        for module in modules.values():
            module.compile()

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        rows = rng.integers(len(latents), size=options.batch)
        tokens = ids[rows]
        tokens[rng.random(len(rows)) < 0.1] = empty  # for classifier-free guidance
        x = latents[torch.from_numpy(rows).to(latents.device)].float().to(device, memory_format=torch.channels_last)
        noise = torch.randn_like(x)
        t = torch.randint(len(alphas), (len(rows),), device=device)
        noised, target = noised_and_target(x, noise, alphas[t], prediction)
        with mixed_precision(device, options.precision):
            text = text_encoder(torch.from_numpy(tokens).to(device)).last_hidden_state
            output = unet(noised, t, text).sample
        error = F.mse_loss(output.float(), target, reduction="none").mean((1, 2, 3))
        return (snr_weight(alphas[t], 5, prediction) * error).mean()

    def watch(trainer: Trainer) -> None:
        if trainer.step % options.sheet == 0:
            draw_sheet(trainer, folder, corpus, options, changes)

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every, watch)
    draw_sheet(trainer, folder, corpus, options, changes)


def train_decoder(folder: Path, corpus: Path, options: argparse.Namespace) -> None:
    """Go on training the decoder while the latents stay as they are, so that UNet and decoder fit in any order.

    The latents get a little noise, because those that the UNet draws are not exactly an encoder's.
    """
    device = torch.device(options.device)
    images = np.load(corpus / "images.npy", mmap_mode="r")
    latents = np.load(corpus / "latents.npy", mmap_mode="r")
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(folder.parent / "vae" / "vae").to(device)
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    trainer = Trainer(folder, modules, options.rate, options.decay, options.precision)

    def decoded(rows: np.ndarray, noise: float) -> torch.Tensor:
        z = torch.from_numpy(latents[rows].astype(np.float32)).to(device)
        return vae.decode((z + noise * torch.randn_like(z)) / vae.config.scaling_factor).sample

    def loss_of_batch(rng: np.random.Generator) -> torch.Tensor:
        rows = np.sort(rng.integers(len(images), size=options.batch))
        with mixed_precision(device, options.precision):
            output = decoded(rows, noise=0.1)
        return F.l1_loss(output.float(), load_images(images, rows).to(device))

    trainer.run(loss_of_batch, options.steps, options.seconds, options.batch, options.every)
    trainer.load_average()
    vae.eval()
    rows = np.arange(min(1024, len(images)))
    with torch.no_grad():
        output = torch.cat([decoded(part, noise=0.0).cpu() for part in np.array_split(rows, 8)])
    error = F.mse_loss(output.clamp(-1, 1), load_images(images, rows)).item()
    vae.save_pretrained(folder / "vae")
    note = {"psnr": psnr_of(error), "samples": trainer.samples, "seconds": trainer.seconds}
    (folder / "decoder.json").write_text(json.dumps(note))
    print(note)


def make_pipeline(average: dict, corpus: Path, changes: dict | None = None) -> StableDiffusionPipeline:
    """Put averaged weights beside the VAE in `corpus`, with the tuned decoder where there is one."""
    changes, tokenizer = changes or {}, build_tokenizer()
    text_encoder = build_text_encoder(len(tokenizer), **changes.get("text_encoder", {}))
    unet = build_unet(**changes.get("unet", {}))
    text_encoder.load_state_dict(average["text_encoder"])
    unet.load_state_dict(average["unet"])
    tuned = corpus / "decoder" / "vae"
    vae = AutoencoderKL.from_pretrained(tuned if tuned.is_dir() else corpus / "vae" / "vae")
    vae.register_to_config(_name_or_path="")  # else the saved configuration would hold this machine's folder
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DPMSolverMultistepScheduler.from_config(
            build_scheduler(**changes.get("scheduler", {})).config,
            algorithm_type="dpmsolver++",
            timestep_spacing="trailing",  # so that few steps suffice (`compare`)
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw_sheet(trainer: Trainer, folder: Path, corpus: Path, options: argparse.Namespace, changes: dict) -> None:
    """Save a sheet of 40 pictures of the averaged weights, one word each."""
    state = torch.get_rng_state()
    pipeline = make_pipeline(trainer.average, corpus, changes).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [p for p in load_pictures() if p.typical] + [p for p in load_pictures() if not p.typical][::4]
    prompts = [f"a photo of a {p.word} {list(PLACES)[k % len(PLACES)]}" for k, p in enumerate(pictures[:40])]
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=4.0, generator=seeds).images
    sheet = Image.new("RGB", (64 * 10, 64 * 4))
    for k, image in enumerate(images):
        sheet.paste(image, (64 * (k % 10), 64 * (k // 10)))
    sheet.save(folder / f"sheet_{trainer.samples:08d}.png")
    torch.set_rng_state(state)


def export(folder: Path, corpus: Path, weights: Path, changes: dict | None = None, initial: str = "") -> None:
    """Write the averaged weights as a Stable Diffusion folder in half precision, with training.json beside them.

    initial: the generator that the training went on from; its own training.json becomes an entry of this one.
    """
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    pipeline = make_pipeline(state["average"], corpus, changes)
    pipeline.to(dtype=torch.float16).save_pretrained(weights)
    recipe = "python -m diffseg.experiments.generator.pretrain corpus  | vae | diffusion | decoder | export"
    note = training_note(recipe, folder, state, pipeline.text_encoder, pipeline.unet, pipeline.vae)
    note["scenes"] = len(np.load(corpus / "latents.npy", mmap_mode="r"))
    for name in ("vae", "decoder"):
        if (corpus / name / f"{name}.json").is_file():
            note[name] = json.loads((corpus / name / f"{name}.json").read_text())
    if initial:
        note["initial"] = json.loads((Path(locate_generator(initial)) / "training.json").read_text())
    write_text(weights / "training.json", json.dumps(note, indent=1) + "\n")
    print({key: note[key] for key in ("samples_seen", "steps", "seconds")})


def trainings(training: Mapping) -> list[Mapping]:
    """Return a generator's training.json after those of the trainings that it went on from, the first one first."""
    return [*(trainings(training["initial"]) if "initial" in training else []), training]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    stages = "corpus", "vae", "latents", "diffusion", "decoder", "export"
    parser = parser_of(__doc__, 1.5e-3, "pretrain", "generator", stages)
    parser.set_defaults(batch=32, every=250)
    parser.add_argument(
        "--initial", default="", help="generator (a name or a folder) that latents, diffusion and export go on from"
    )
    parser.add_argument("--scenes", type=int, default=60000, help="scenes in the corpus")
    parser.add_argument("--pair-share", type=float, default=0.6, help="share of the scenes that show two objects")
    parser.add_argument("--sheet", type=int, default=1000, help="steps between sample sheets")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="bf16 on cuda, else fp32. On a CPU with avx512_bf16 or AMX (see lscpu) bf16 is 1.4 times as fast, on any "
        "other it is slow",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the networks of the stage diffusion: takes a C++ compiler and two minutes at every start, "
        "then is 1.2 to 1.4 times as fast on a CPU",
    )
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("bf16" if options.device.startswith("cuda") else "fp32")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    corpus = options.folder
    if options.stage == "corpus":
        make_corpus(corpus, options.scenes, options.pair_share, options.seed, options.workers or os.cpu_count())
    elif options.stage == "vae":
        train_vae(options.folder / "vae", corpus, options)
    elif options.stage == "latents":
        encode_corpus(corpus, options)
    elif options.stage == "diffusion":
        train_diffusion(options.folder / "diffusion", corpus, options)
    elif options.stage == "decoder":
        train_decoder(options.folder / "decoder", corpus, options)
    else:
        export(options.folder / "diffusion", corpus, options.weights, initial=options.initial)


if __name__ == "__main__":
    main()
