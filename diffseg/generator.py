"""Load a text-to-image generator, and draw images whose every pixel follows from prompt and seed."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from diffusers.schedulers import KarrasDiffusionSchedulers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffseg.errors import DiffsegError
from diffseg.families import call_arguments, denoiser_of, family_of, image_size, latent_noise
from diffseg.paths import is_short_name, locate
from diffseg.weight_files import check_file, check_hub_id, check_pipeline_folder, check_tokenizer, get_online

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what waits on the CPU while it is not needed: nothing, whole models, groups of layers, or every layer
OFFLOADS = ("none", "model", "group", "sequential")
# own: as in the generator's files. dpm++: the second-order solver, with their timesteps, or with timesteps that are
# counted from the cleanest one up (leading, as Stable Diffusion does) or from the noisiest one down (trailing)
SCHEDULERS = {
    "own": {},
    "dpm++": {},
    "dpm++ leading": {"timestep_spacing": "leading"},
    "dpm++ trailing": {"timestep_spacing": "trailing"},
}
BAR_AFTER = 10  # seconds


def locate_generator(name: str) -> str:
    """Return the folder or file (a relative one counts from the project's root) or hub id that `name` stands for."""
    place = locate("generator", name)
    return str(place) if place.exists() else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the (first) tokenizer of a generator. Raises a DiffsegError when there is none."""
    place = locate_generator(name)
    try:
        folder = Path(_config_of(Path(place)) if Path(place).is_file() else place)
        if not folder.is_dir():
            check_hub_id(str(folder))
            folder = Path(snapshot_download(str(folder), allow_patterns=["tokenizer/*"]))
        check_tokenizer(folder / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    except Exception as error:  # as with the pipeline below
        raise _unloadable(name, place, error) from error
    _check_tokenizers(name, place, {"tokenizer": tokenizer})
    return tokenizer


def load_generator(
    name: str,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    variant: str = "",
    offload: str = "none",
    scheduler: str = "dpm++",
) -> DiffusionPipeline:
    """Load any text-to-image pipeline of diffusers in inference mode, from a folder, a .safetensors file or the hub.

    precision: one of PRECISIONS; on a CPU, which is slow in half precision, always fp32. variant: the word in the names
    of the weights' files, as in `model.fp16.safetensors`. offload: one of OFFLOADS; on a CPU always "none". scheduler:
    one of SCHEDULERS; all but "own" exchange it for the second-order multistep solver where `takes_dpm` allows it.

    Only safetensors are read, and code of a hub repository is never run. Raises a DiffsegError for an unknown option,
    and when something is missing or damaged.
    """
    for value, known, what in ((precision, PRECISIONS, "precision"), (offload, OFFLOADS, "generator_offload"),
                               (scheduler, SCHEDULERS, "generator_scheduler")):  # fmt: skip
        if value not in known:
            raise DiffsegError(f"there is no {what} {value!r}; choose one of {', '.join(known)}")
    if torch.device(device).type == "cpu":
        if precision != "fp32":
            print(f"{precision} is much slower than fp32 on a CPU, so the generator is loaded in fp32.")
        if offload != "none":
            print(f"There is no GPU to offload from, so generator_offload={offload} has no effect.")
        precision, offload = "fp32", "none"
    diffusers.utils.logging.disable_progress_bar()  # loading is short; our bars are for what takes long
    transformers.utils.logging.disable_progress_bar()
    pipeline = _load_pipeline(name, PRECISIONS[precision], variant)
    if scheduler != "own" and takes_dpm(pipeline.scheduler):
        config = pipeline.scheduler.config
        # named, as from_config passes over what the files leave to the first scheduler's defaults
        spacing = {"timestep_spacing": config.get("timestep_spacing", "linspace")} | SCHEDULERS[scheduler]
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", **spacing)
    # a batch that takes long, as on a CPU, would be silent: the bars around it count whole batches
    pipeline.set_progress_bar_config(desc="denoising", leave=False, delay=BAR_AFTER)
    if offload == "none":
        return pipeline.to(device)
    offload_pipeline(pipeline, device, offload)
    return pipeline


def takes_dpm(scheduler) -> bool:
    """Return whether DPM-Solver++ may take a scheduler's place: the model predicts noise or velocity of a noise
    schedule, and is not distilled to a few steps.

    Flow matching, LCM, TCD and SCM have schedulers of their own. Turbo and Lightning models are known by their
    "trailing" timesteps; models with zero terminal SNR, and those that name this solver, have these too, but are not
    distilled.
    """
    config = scheduler.config
    keeps_trailing = config.get("rescale_betas_zero_snr", False) or config.get("algorithm_type") == "dpmsolver++"
    return (
        type(scheduler).__name__ in KarrasDiffusionSchedulers.__members__
        and "beta_schedule" in config  # EDM's have none
        and config.prediction_type in ("epsilon", "v_prediction", "sample")
        and not config.get("use_flow_sigmas", False)
        and (config.get("timestep_spacing") != "trailing" or keeps_trailing)
    )


def offload_pipeline(pipeline: DiffusionPipeline, device: str | torch.device, offload: str) -> None:
    """Keep the pipeline on the CPU and take to `device` what runs. It must not be moved by `.to` afterwards."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        try:
            pipeline.enable_group_offload(torch.device(device), offload_type="leaf_level")
        except ValueError as error:
            name = type(pipeline).__name__
            raise DiffsegError(f"{name} cannot be offloaded by groups; set generator_offload=model") from error
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


def _load_pipeline(name: str, dtype: torch.dtype, variant: str) -> DiffusionPipeline:
    place = locate_generator(name)
    try:
        if Path(place).is_file():
            pipeline = _load_single_file(Path(place), dtype)
        else:
            if not Path(place).is_dir():
                check_hub_id(place)
                place = DiffusionPipeline.download(
                    place, variant=variant or None, use_safetensors=True, trust_remote_code=False
                )
            check_pipeline_folder(Path(place), variant)
            index = DiffusionPipeline.load_config(place)
            # what the folder leaves out, as SD 3 may its T5; and the checker, which blackens images
            absent = {key: None for key, value in index.items() if isinstance(value, list) and value[0] is None}
            if "safety_checker" in index:
                absent |= {"safety_checker": None, "requires_safety_checker": False}
            pipeline = DiffusionPipeline.from_pretrained(
                place,
                dtype=dtype,
                variant=variant or None,
                use_safetensors=True,
                trust_remote_code=False,
                **absent,
            )
    except Exception as error:  # from_pretrained raises a dozen kinds for missing and damaged files
        raise _unloadable(name, place, error) from error
    for part, module in pipeline.components.items():
        lost = [key for key, weight in getattr(module, "named_parameters", list)() if weight.is_meta]
        if lost:  # diffusers warns only
            raise _unloadable(name, place, OSError(f"the weights of its {part} lack {lost[0]}"))
    tokenizers = {key: part for key, part in pipeline.components.items() if key.startswith("tokenizer") and part}
    _check_tokenizers(name, place, tokenizers)
    return pipeline


def _load_single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a whole pipeline from one file, as Stable Diffusion is distributed (Flux's holds its transformer alone)."""
    check_file(path)
    if path.suffix != ".safetensors":
        raise DiffsegError(f"{path.name} is no .safetensors file; only these are read, choose another copy.")
    config = _config_of(path)
    kind = getattr(diffusers, DiffusionPipeline.load_config(config)["_class_name"])
    if not hasattr(kind, "from_single_file"):
        raise DiffsegError(f"diffusers cannot load {kind.__name__} from one file; give its folder or hub id.")
    try:
        return kind.from_single_file(str(path), config=config, dtype=dtype)
    except SingleFileComponentError as error:
        raise DiffsegError(
            f"{path.name} does not hold all of a {kind.__name__}; give the folder or hub id of the whole pipeline."
        ) from error


def _config_of(path: Path) -> str:
    """Return the folder or hub id that tells how a one-file checkpoint is built, and holds its tokenizers."""
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "model_index.json").is_file():
            return str(folder)
    config = fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"]
    try:
        DiffusionPipeline.load_config(config)
    except OSError as error:
        raise DiffsegError(
            f"the configuration of {path.name} is neither at hand nor to be had from the hub ({config}); copy that "
            f"repository's folder, weights are not needed, to {path.with_suffix('')}."
        ) from error
    return config


def _check_tokenizers(name: str, place: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    # where files are missing, transformers 5 makes an empty tokenizer instead of raising
    for part, tokenizer in tokenizers.items():
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise _unloadable(name, place, OSError(f"its {part} has no vocabulary"))


def _unloadable(name: str, place: str, error: Exception) -> DiffsegError:
    reason = textwrap.shorten(str(error) or type(error).__name__, 200).rstrip(".")
    if is_short_name("generator", name):
        remedy = "restore the package's weights (git checkout, or reinstall)"
    elif isinstance(error, DiffsegError):
        return DiffsegError(f"the generator {name!r} cannot be loaded from {place}: {error}")
    elif Path(place).exists():
        remedy = "download or save it again"
    else:
        remedy = f"{get_online(error)}, or give a local folder in diffusers' layout or a .safetensors file"
    return DiffsegError(f"the generator {name!r} cannot be loaded from {place} ({reason}); {remedy}")


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    sampling_steps: int = 20,
    guidance_scale: float = 4.0,
) -> list[Image.Image]:
    """Draw one image for each prompt from its own seed, so that an image does not depend on its batch.

    The noise of each image comes from a CPU generator of its own, in float32 whatever the generator's precision:
    the same on every device and, up to rounding, in every precision. (Left to diffusers, it is drawn in the generator's
    precision: on a GPU with torch 2.11 the images in fp16 were others altogether.) An image with pixels that are no
    numbers, as a VAE in half precision can give, comes out black. negative: empty texts alone are none.
    guidance_scale: 1 is no guidance, in every family. Raises a DiffsegError for negative prompts of a family that has
    none, or of a part of the images, and for a size that the generator cannot draw.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    height, width = image_size(pipeline, height, width)
    noise = latent_noise(pipeline, generators, height, width)
    family = family_of(pipeline)
    strength = max(0.0, guidance_scale - 1) if family.guides_above_zero else guidance_scale
    options = call_arguments(pipeline, sampling_steps) | {family.guidance: strength}
    if any(negative or ()):
        if not family.negative:
            raise DiffsegError(f"{type(pipeline).__name__} takes no negative prompt; leave negative_prompt empty")
        if not all(negative):  # families differ in what an empty text among others is
            raise DiffsegError("a batch has negative prompts for some of its images; give all of them one, or none")
        options["negative_prompt"] = list(negative)
    elif "true_cfg_scale" in options and guidance_scale > 1:  # which acts only against a negative prompt
        options["negative_prompt"] = [" "] * len(prompts)
    pixels = pipeline(
        prompt=list(prompts),
        height=height,
        width=width,
        num_inference_steps=sampling_steps,
        generator=generators,
        latents=noise.to(denoiser_of(pipeline).dtype),
        output_type="np",
        **options,
    ).images
    pixels[~np.isfinite(pixels).all(axis=(1, 2, 3))] = 0
    return pipeline.image_processor.numpy_to_pil(pixels)
