"""Adapt the generator to a distant domain: LoRA (Hu et al. 2022) on the UNet's attention or other layers of it.

A linear layer W (out x in; of a convolution, in counts its inputs times its taps) stays frozen; beside it a product of
two thin matrices learns

    W' = W + alpha / r  B A            A: r x in, random at the start;  B: out x r, zero at the start

so that training begins at the base model exactly, and the result is a small file. No label and no mask is
read: the loss is that of the generator's own training, on noised latents of the target images.

Every random draw (image, crop, caption, noise, timestep) follows from the seed and the draw's number. So a
run that was killed and goes on computes what it would have computed, and many processes what one would.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffseg.adapters import load_adapter, remove_adapter
from diffseg.denoising import diffusion_loss
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, write_rows
from diffseg.seeds import derive_seed
from diffseg.target_domain import Draws, find_pictures, own_captions
from diffseg.weight_files import check_file

ADAPTER = "tuned"  # the adapter's name inside the UNet
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' own file name, so that any tool finds it
CHECKPOINT = "checkpoint.pt"
LOSSES = "losses.csv"


@dataclass(frozen=True)
class TuningOptions:
    """What tuning depends on besides images, captions and seed; our choice, as the paper's is unknown."""

    height: int  # of the training images, in pixels; a multiple of the VAE's factor (8 for SD 1.x and 2.x)
    width: int
    rank: int = 8  # r; at most the smallest side of a tuned layer
    alpha: float = 8.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # layers whose name ends so
    learning_rate: float = 1e-4  # AdamW's; constant after the warm-up
    warmup: int = 0  # optimizer steps of linear warm-up
    steps: int = 500  # optimizer steps in all
    batch: int = 4  # images an optimizer step, over all processes
    snr_gamma: float = 5.0  # min-SNR weights (Hang et al. 2023); 0: every timestep weighs the same
    caption_dropout: float = 0.1  # share of empty captions, which classifier-free guidance needs
    ema: float = 0.0  # decay of an average of the weights that replaces them at the end; 0: none
    precision: str = "fp32"  # of the computation: fp32, or mixed with fp16 (GPU only) or bf16
    gradient_checkpointing: bool = False  # less memory for about a third more time
    checkpoint_every: int = 100  # optimizer steps between checkpoints


# --------------------------------------------------------------------------------------------------- tuning


def target_layers(unet, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return {layer: (inputs, outputs)} of the linear layers and convolutions whose name ends in one of `targets`.

    The inputs of a convolution are its channels times its taps. Raises a DiffsegError for a target that no layer has.
    """
    sizes = {
        name.removesuffix(".base_layer"): (layer.weight[0].numel(), len(layer.weight))
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "lora_" not in name
    }
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in sizes):
            known = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in sizes})  # to_q, to_out.0, conv1
            raise DiffsegError(f"no layer of the UNet is called {target!r}; there are {', '.join(known)}.")
    return {name: size for name, size in sizes.items() if f".{name}".endswith(tuple(f".{t}" for t in targets))}


def check_options(pipeline, options: TuningOptions) -> None:
    """Raise a DiffsegError for an option that does not fit itself or the pipeline."""
    positive = "rank", "alpha", "learning_rate", "steps", "batch", "checkpoint_every", "height", "width"
    factor = pipeline.vae_scale_factor
    for names, holds, rule in (
        (positive, lambda value: value > 0, "above 0"),
        (("snr_gamma", "warmup"), lambda value: value >= 0, "0 or above"),
        (("caption_dropout", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (
            ("height", "width"),
            lambda value: value % factor == 0,
            f"a multiple of {factor} for this generator",
        ),
        (("precision",), lambda value: value in ("fp32", "fp16", "bf16"), "fp32, fp16 or bf16"),
        (("targets",), len, "a list with a layer at least, such as to_q"),
    ):
        for name in names:
            if not holds(getattr(options, name)):
                raise DiffsegError(f"lora_{name} must be {rule}, not {getattr(options, name)!r}.")
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise DiffsegError("lora_precision fp16 needs a GPU; choose bf16 or fp32.")
    largest = min(min(size) for size in target_layers(pipeline.unet, options.targets).values())
    if options.rank > largest:
        raise DiffsegError(
            f"the LoRA rank {options.rank} does not fit: the smallest tuned layer has {largest} inputs or "
            f"outputs; choose lora_rank from 1 to {largest}."
        )


def add_lora(pipeline, options: TuningOptions, seed: int) -> dict[str, torch.nn.Parameter]:
    """Freeze the pipeline, put a fresh LoRA into its UNet, and return its parameters (float32) by name."""
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False)
    remove_adapter(pipeline, ADAPTER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora", "init"))
        config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=list(options.targets))
        pipeline.unet.add_adapter(config, ADAPTER)
    parameters = {name: p for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # small steps vanish in half precision
    return parameters


class Tuner:
    """All that a step of tuning changes: the LoRA in the UNet, its optimizer, learning rate and average, the losses."""

    def __init__(self, pipeline, options: TuningOptions, accelerator: Accelerator, checkpoint: Path, seed: int):
        self.options, self.accelerator, self.checkpoint = options, accelerator, checkpoint
        self.parameters = add_lora(pipeline, options, seed)
        optimizer = torch.optim.AdamW(self.parameters.values(), options.learning_rate, weight_decay=0.01)
        self.schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=options.warmup)
        self.average = EMAModel(list(self.parameters.values()), decay=options.ema) if options.ema else None
        self.rows: list[dict] = []  # step, loss, learning rate
        self.kept = 0  # steps in the checkpoint
        pipeline.unet.train()
        if options.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        self.unet, self.optimizer = accelerator.prepare(pipeline.unet, optimizer)

    def learn(self, loss: torch.Tensor) -> float:
        """Take one optimizer step down the loss; return its mean over the processes."""
        value = self.accelerator.gather(loss.detach()).mean().item()
        if not np.isfinite(value):
            raise self.diverged("loss is", len(self.rows) + 1)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        rate = self.schedule.get_last_lr()[0]
        self.rows.append({"step": len(self.rows) + 1, "loss": value, "learning_rate": rate})
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(self.parameters.values())
        return value

    def diverged(self, what: str, step: int) -> DiffsegError:
        other = f", or set lora_steps to {self.kept}, before that" if self.kept else ""
        return DiffsegError(
            f"the {what} not finite at step {step} of {self.options.steps}; lower lora_learning_rate{other}."
        )

    def save(self, recipe: str) -> None:
        """Write a checkpoint; weights that are not finite raise a DiffsegError, and the last checkpoint stays."""
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise self.diverged("weights are", len(self.rows))
        scaler = self.accelerator.scaler
        state = {
            "recipe": recipe,
            "rows": self.rows,
            "lora": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self.average.state_dict() if self.average else None,
        }
        if self.accelerator.is_main_process:
            with atomic_path(self.checkpoint) as path:
                torch.save(state, path)
        self.kept = len(self.rows)

    def resume(self, state: dict) -> None:
        """Take over what `save` wrote and `load_checkpoint` read."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["lora"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)
        self.rows, self.kept = state["rows"], len(state["rows"])


def tune(
    pipeline,
    pictures: str | Path | Sequence[Path],
    captions: Sequence[str],
    options: TuningOptions,
    folder: str | Path,
    seed: int = 0,
) -> list[float]:
    """Tune the UNet (SD 1.x, 2.x or XL) to unlabelled images, a folder of them or some paths; return each step's loss.

    Writes to `folder` the LoRA's weights with its settings (WEIGHTS), LOSSES (step, loss, learning rate), and
    CHECKPOINT every `checkpoint_every` steps. Resumes from a checkpoint of the same images, captions, options and
    seed; more `steps` than before prolong a finished run. Leaves the LoRA at work in the pipeline, which is on
    Accelerate's device then. Runs in one process, or in several under `accelerate launch`.

    Raises a DiffsegError for bad images, captions or options, for a checkpoint of another run, and for a loss that is
    not finite: then the last good checkpoint stays.
    """
    if not isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise DiffsegError(
            f"tuning serves Stable Diffusion 1, 2 and XL, not {type(pipeline).__name__}; train a LoRA for it with "
            "diffusers' examples/dreambooth and give its file as generator_lora, with target_images empty."
        )
    folder, captions = Path(folder), list(captions)
    if not captions or any(not caption.strip() for caption in captions):
        raise DiffsegError("the captions must be one or more texts that say what the images show.")
    check_options(pipeline, options)
    paths = find_pictures(pictures) if isinstance(pictures, str | Path) else list(pictures)
    if not paths:
        raise DiffsegError("there is no image to tune on; lower lora_held_out, or give more target images.")
    accelerator = make_accelerator(options)
    recipe = describe(paths, captions, options, seed)
    state = load_checkpoint(folder / CHECKPOINT, recipe, options.steps)
    pipeline.to(accelerator.device)
    tuner = Tuner(pipeline, options, accelerator, folder / CHECKPOINT, seed)
    if state:
        tuner.resume(state)
    draws = Draws(pipeline, paths, captions, options.height, options.width, options.caption_dropout, seed)
    numbers = range(tuner.kept * options.batch, options.steps * options.batch)
    batches = accelerator.prepare(DataLoader(draws, options.batch // accelerator.num_processes, sampler=numbers))
    quiet = not accelerator.is_main_process
    bar = tqdm(batches, "tuning", options.steps, initial=tuner.kept, unit="step", disable=quiet)
    try:
        for step, batch in enumerate(bar, start=tuner.kept + 1):
            value = tuner.learn(diffusion_loss(pipeline, tuner.unet, batch, options.snr_gamma))
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            if step % options.checkpoint_every == 0 or step == options.steps:
                tuner.save(recipe)
    finally:
        bar.close()
        if accelerator.is_main_process:
            write_rows(folder / LOSSES, tuner.rows, ("step", "loss", "learning_rate"))
        # takes the mixed-precision wrapper off, so that images are drawn as after loading
        pipeline.unet = accelerator.unwrap_model(tuner.unet, keep_fp32_wrapper=False).eval()
        vars(pipeline.unet).pop("_is_accelerate_prepared", None)  # else the next call would not put it on again
        pipeline.unet.disable_gradient_checkpointing()
    if tuner.average:
        tuner.average.copy_to(tuner.parameters.values())
    if accelerator.is_main_process:
        save_lora(pipeline, folder)
    accelerator.wait_for_everyone()
    return [row["loss"] for row in tuner.rows]


def make_accelerator(options: TuningOptions) -> Accelerator:
    """Return what runs the tuning; a precision or batch that does not work here raises a DiffsegError."""
    AcceleratorState._reset_state()  # else this process could not change the precision of an earlier run
    try:
        accelerator = Accelerator(mixed_precision="no" if options.precision == "fp32" else options.precision)
    except ValueError as error:
        raise DiffsegError(f"lora_precision {options.precision!r} does not work here ({error}); use fp32.") from None
    if options.batch % accelerator.num_processes:
        raise DiffsegError(
            f"lora_batch {options.batch} must be a multiple of the {accelerator.num_processes} processes."
        )
    return accelerator


def describe(paths: Sequence[Path], captions: Sequence[str], options: TuningOptions, seed: int) -> str:
    """Return as JSON all that the tuned weights follow from, but for the number of steps."""
    kept = {k: v for k, v in asdict(options).items() if k not in ("steps", "checkpoint_every")}
    root = os.path.commonpath([path.parent for path in paths])  # the folder may have moved
    pictures = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in paths]
    recipe = {"options": kept, "captions": captions, "seed": seed, "pictures": pictures}
    if own := own_captions(paths):
        recipe["own_captions"] = {path.relative_to(root).as_posix(): text for path, text in own.items()}
    return json.dumps(recipe, sort_keys=True)


def load_checkpoint(path: Path, recipe: str, steps: int) -> dict | None:
    """Return a checkpoint's state or None; raise a DiffsegError when it is damaged or not of this run."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise DiffsegError(f"the checkpoint {path} is damaged; delete it to start again.") from error
    if state["recipe"] != recipe:
        raise DiffsegError(f"{path} is of other images, captions, options or seed; delete it or use another folder.")
    done = len(state["rows"])
    if done > steps:
        raise DiffsegError(f"{path} has {done} steps already, more than lora_steps {steps}; delete it to start again.")
    return state


# ------------------------------------------------------------------------------------------- saving, loading


def save_lora(pipeline, folder: Path) -> None:
    """Write the LoRA in the pipeline's UNet to WEIGHTS, in diffusers' own format.

    Alpha is not part of the weights: it is kept in the file's metadata with the other settings, without which
    a loader would take alpha = rank.
    """
    settings = pipeline.unet.peft_config[ADAPTER].to_dict()
    # a set's order differs between processes
    settings = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)}
    with atomic_path(folder / WEIGHTS) as path:
        pipeline.save_lora_weights(
            path.parent,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name=ADAPTER),
            weight_name=path.name,
            # diffusers' own function writes a second entry, and safetensors writes two in random order: the
            # same weights would be another file, and step 03 would run again for nothing
            save_function=lambda weights, name: Path(name).write_bytes(save(weights, metadata)),
        )


def load_lora(pipeline, folder: str | Path, scale: float = 1.0) -> None:
    """Put the LoRA that `tune` wrote to `folder` into the UNet; scale 0 is the base model, 1 the tuned one.

    Takes the place of a LoRA that was there. Raises a DiffsegError when there is no file, it is damaged, or
    it belongs to another base model.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise DiffsegError(f"there is no LoRA {path}; run 02_lora_tuning first.")
    try:
        check_file(path)
    except DiffsegError as error:
        raise DiffsegError(f"the LoRA {path} is damaged; run 02_lora_tuning again.") from error
    load_adapter(pipeline, path.absolute(), scale, ADAPTER)
