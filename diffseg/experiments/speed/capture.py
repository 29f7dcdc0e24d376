"""What do capture and refiners cost? Images per second beside the plain pipeline, in one run.

python -m diffseg.experiments.speed.capture      writes results/benchmarks/capture.json

Every repetition calls all variants in turn, and a ratio is the median of the ratios within a repetition, so a change
in the machine's load meets plain and captured images alike. Pipelines (random weights but for `mini`):

- mini: the shipped generator, 64 x 64 pixels, batch 4;
- sd15-quarter: Stable Diffusion 1.5 with 2 of its 8 heads: 64 x 64 latents, 77 tokens, all 16 cross-attention layers,
  real head sizes (40, 80, 160, 160), but widths of 80 to 320 in place of 320 to 1280, so that two cores can run it.
  The convolutions shrink sixteenfold and the attention maps fourfold: the ratio is harder to hold than at full size;
- sdxl-fifth: XL with a fifth of its heads: 128 x 128 latents, 77 tokens, all 70 cross-attention layers at 64 x 64 and
  32 x 32 positions, heads of 64, but widths of 64 to 256 in place of 320 to 1280; harder to hold, too;
- flux-quarter: Flux schnell with 6 of its 24 heads of 128, 256 tokens, but 32 x 32 of its 64 x 64 positions, so that
  attention and the linear layers keep about their proportion; 4 of its 19 double blocks and none of its 38 single ones,
  of which attention-map-diffusers records nothing.

Where the package attention-map-diffusers (1.0, MIT) is installed, it is timed on the same layers and steps, for the
same tokens: as it comes, when it keeps queries and keys for later ("fast"), and when it computes at once ("exact").
Peak memory is that of a process which makes one call, one process for each variant.
Generators of full size on a GPU: `diffseg.experiments.speed.capture_gpu`.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffseg.attention import AttentionRecorder
from diffseg.benchmarks.classes import VOC
from diffseg.drawing import draw_rows
from diffseg.experiments.full_size import NOISE, sdxl_unet, vae
from diffseg.experiments.speed import time_in_turn
from diffseg.files import write_text
from diffseg.generator import load_generator, load_tokenizer
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root
from diffseg.prompts import Prompt, augment
from diffseg.refiners import REFINERS, refiners_at_hand
from diffseg.synthesis import SynthesisOptions, draw_with_masks
from diffseg.tokens import key_positions
from diffseg.words import load_words, select_words

GUIDANCE = 4.0
PEER = "attention-map-diffusers"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pipeline to be measured. resolutions: of its attention maps, the one that is used first."""

    build: Callable[[], DiffusionPipeline]
    side: int  # pixels
    resolutions: tuple[int, ...]
    batch: int
    steps: int
    repetitions: int
    memory_steps: tuple[int, ...]
    refined: bool = False  # with the refiners, too


def tokenizer():
    """Return the shipped tokenizer, with CLIP's number of positions: the words do not matter here."""
    found = load_tokenizer("mini")
    found.model_max_length = 77
    return found


def text_encoder(width: int, kind: type = CLIPTextModel):
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return kind(config).eval()


def build_sd15(heads: int) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1.5's shape with that many of its 8 heads, and random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(heads * size for size in (40, 80, 160, 160)),
        attention_head_dim=heads,  # in diffusers the number of heads, for a UNet of SD 1.x
        cross_attention_dim=768,
        norm_num_groups=4 * heads,
    )
    return StableDiffusionPipeline(
        vae=vae(sample_size=512, block_out_channels=(32, 64, 128, 128)),
        text_encoder=text_encoder(768),
        tokenizer=tokenizer(),
        unet=unet.eval(),
        scheduler=DPMSolverMultistepScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl(heads: int) -> StableDiffusionXLPipeline:
    """Return a pipeline of XL's shape with that many of its 10 heads at 64 x 64 positions, and random weights."""
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae(sample_size=1024, block_out_channels=(16, 32, 64, 64), norm_num_groups=16),
        text_encoder(768),
        text_encoder(1280, CLIPTextModelWithProjection),
        tokenizer(),
        tokenizer(),
        sdxl_unet(heads),
        DPMSolverMultistepScheduler(**NOISE),
    )


def build_flux(heads: int, double: int, single: int) -> FluxPipeline:
    """Return a pipeline of Flux schnell's shape with that many heads (of 24) and blocks, and random weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=128, num_layers=double, num_single_layers=single,
        guidance_embeds=False,
    )  # fmt: skip
    words = tokenizer()
    t5 = T5Config(vocab_size=len(words), d_model=transformer.config.joint_attention_dim, d_ff=1024, num_layers=1)
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(block_out_channels=(16, 32, 64, 64), norm_num_groups=16, latent_channels=16, shift_factor=0.1),
        text_encoder(768),
        tokenizer(),
        T5EncoderModel(t5).eval(),
        words,
        transformer.eval(),
    )


PIPELINES = {
    "mini": Shape(lambda: load_generator("mini"), 64, (16, 8, 4), 4, 12, 7, (5, 40), refined=True),
    "sd15-quarter": Shape(lambda: build_sd15(2), 512, (16, 64, 32, 8), 1, 4, 5, (1, 4), refined=True),
    "sdxl-fifth": Shape(lambda: build_sdxl(2), 1024, (32, 64), 1, 1, 3, (1, 2)),
    "flux-quarter": Shape(lambda: build_flux(6, 4, 0), 512, (32,), 1, 2, 5, (1, 4)),
}


def build(name: str) -> DiffusionPipeline:
    pipeline = PIPELINES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts_for(pipeline, count: int) -> list[Prompt]:
    words = select_words(load_words("voc"), pipeline.tokenizer)
    return augment(words, count, templates=["a photo of {} {place}"], places=["on the grass"])


def options_for(shape: Shape, steps: int | None = None) -> SynthesisOptions:
    steps = steps or shape.steps
    return SynthesisOptions(shape.side, shape.side, steps, GUIDANCE, shape.resolutions[:1], "all", 0.2, "none")


def capture(pipeline, rows: Sequence[Prompt], options: SynthesisOptions, **how) -> AttentionRecorder:
    """Draw the rows with a recorder and read its maps; `how` goes to the recorder."""
    tokens = [key_positions(pipeline, row.prompt, row.spans) for row in rows]
    with AttentionRecorder(pipeline, tokens, **how) as recorder:
        draw_rows(pipeline, rows, options)
    recorder.maps()
    return recorder


def capture_by_peer(pipeline, rows: Sequence[Prompt], options: SynthesisOptions, mode: str) -> None:
    """Draw the rows while the package attention-map-diffusers records every layer and step, and compute its maps."""
    from attention_map_diffusers import AttentionCapture

    tokens = {k for row in rows for word in key_positions(pipeline, row.prompt, row.spans) for k in word}
    with AttentionCapture(pipeline, timesteps="all", mode=mode, tokens=sorted(tokens)) as recorder:
        draw_rows(pipeline, rows, options)
    recorder.compute()


def captures(pipeline, rows: Sequence[Prompt], options: SynthesisOptions, shape: Shape) -> dict[str, Callable]:
    """Return the plain call, "plain", and those that record every denoising step, the dearest choice, by name.

    The package attention-map-diffusers, if it is at hand, records every layer that reads the prompt; so does the
    variant before it.
    """
    first, every = shape.resolutions[:1], sorted(shape.resolutions, reverse=True)
    calls: dict[str, Callable] = {
        "plain": lambda: draw_rows(pipeline, rows, options),
        f"capture {first[0]}": lambda: capture(pipeline, rows, options, resolutions=first),
    }
    if len(every) > 1:
        calls[f"capture {'+'.join(map(str, every))}"] = lambda: capture(pipeline, rows, options, resolutions=every)
    if importlib.util.find_spec("attention_map_diffusers"):
        for mode in ("fast", "exact"):
            calls[f"{PEER}, {mode}"] = lambda mode=mode: capture_by_peer(pipeline, rows, options, mode)
    return calls


def refinements(
    pipeline, rows: Sequence[Prompt], options: SynthesisOptions, sam_checkpoint: str, sam_model: str
) -> dict[str, Callable]:
    """Return the calls from prompt to mask with each refiner that is at hand, by name."""
    calls = {}
    for refiner in refiners_at_hand(list(REFINERS), sam_checkpoint):
        own = dataclasses.replace(options, refiner=refiner, sam_checkpoint=sam_checkpoint, sam_model=sam_model)
        name = f"capture {options.attention_resolutions[0]}, {refiner}"
        calls[name] = lambda own=own: draw_with_masks(pipeline, rows, VOC, own)
    return calls


def compare(calls: dict[str, Callable], pictures: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Time calls side by side, the first of them as the base; each call makes that many images (or iterations).

    For each: seconds and cpu_seconds of an image and images_per_second (medians), ratio and cpu_ratio to the base
    (median over the repetitions). CPU seconds are those of this process's threads; another process on the same
    cores disturbs them less than the wall time.
    """
    for call in calls.values():
        call()  # the first round pays for memory and kernels
    times = time_in_turn(calls, repetitions)
    base = next(iter(times.values()))
    found = {}
    for name, measured in times.items():
        wall, cpu = (statistics.median(values) / pictures for values in zip(*measured, strict=True))
        ratios = [[a / b for a, b in zip(one, two, strict=True)] for one, two in zip(measured, base, strict=True)]
        ratio, cpu_ratio = (statistics.median(values) for values in zip(*ratios, strict=True))
        found[name] = {
            "images_per_second": 1 / wall,
            "seconds": wall,
            "cpu_seconds": cpu,
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
        }
    return found


def recorder_bytes(recorder: AttentionRecorder) -> int:
    """Return the bytes of all tensors that a recorder holds."""
    tensors = [recorder.weights, *recorder.sums.values()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def memory_here(name: str, steps: int, variant: str) -> dict[str, int]:
    """Return this process's peak of resident memory after one call, and our recorder's own tensors, in bytes."""
    shape, pipeline = PIPELINES[name], build(name)
    rows, options = prompts_for(pipeline, 1), options_for(shape, steps)
    made = captures(pipeline, rows, options, shape)[variant]()
    held = recorder_bytes(made) if isinstance(made, AttentionRecorder) else 0
    # getrusage would give the parent's peak where that is larger: it survives the start of a process
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return {"peak": int(peak.split()[1]) * 1024, "recorder": held}


def measure_memory(name: str, variants: Sequence[str]) -> list[dict]:
    """Measure peak memory of each variant for several numbers of steps, each in a process of its own."""
    found = []
    for steps in PIPELINES[name].memory_steps:
        for variant in variants:
            command = [sys.executable, "-m", "diffseg.experiments.speed.capture", "--memory", name, str(steps), variant]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append({"steps": steps, "variant": variant, **json.loads(printed.splitlines()[-1])})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--repetitions", type=int, help="in place of each pipeline's own number")
    parser.add_argument("--sam-checkpoint", default="", help="file of Segment Anything's weights, to time that refiner")
    parser.add_argument("--sam-model", default="vit_b", help="which of its models the file holds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurements of memory")
    parser.add_argument("--output", type=Path, default=project_root() / "results" / "benchmarks" / "capture.json")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # the processes of measure_memory
    arguments = parser.parse_args()
    if arguments.memory:
        name, steps, variant = arguments.memory
        print(json.dumps(memory_here(name, int(steps), variant)))
        return
    # the pipelines that are not measured now keep what an earlier run found
    kept = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    report: dict = {"pipelines": {name: row for name, row in kept.get("pipelines", {}).items() if name in PIPELINES}}
    report["gpu"] = kept.get("gpu", {})
    for name in arguments.pipelines:
        shape, pipeline = PIPELINES[name], build(name)
        repetitions = arguments.repetitions or shape.repetitions
        rows, options = prompts_for(pipeline, shape.batch), options_for(shape)
        calls = captures(pipeline, rows, options, shape)
        variants = list(calls)
        if shape.refined:
            calls |= refinements(pipeline, rows, options, arguments.sam_checkpoint, arguments.sam_model)
        print(f"{name}: batch {shape.batch}, {shape.steps} steps, {repetitions} repetitions of {', '.join(calls)}")
        compared = compare(calls, shape.batch, repetitions)
        del pipeline, calls
        found = {"guidance_scale": GUIDANCE, "threads": torch.get_num_threads(), "batch": shape.batch,
                 "steps": shape.steps, "repetitions": repetitions, "variants": compared}  # fmt: skip
        for variant, values in compared.items():
            print(f"  {variant:30} {values['images_per_second']:8.3f} images/s, time x {values['ratio']:.3f}, "
                  f"CPU time x {values['cpu_ratio']:.3f}")  # fmt: skip
        if not arguments.no_memory:
            found["memory"] = measure_memory(name, variants)
        report["pipelines"][name] = found | provenance()
        write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(arguments.output)


if __name__ == "__main__":
    main()
