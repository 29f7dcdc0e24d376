"""What do capture and refiners cost? Pictures per second beside the plain pipeline, in one run.

python -m diffseg.experiments.speed.capture      writes results/benchmarks/capture.json

Every repetition calls all variants in turn, and a ratio is the median of the ratios within a repetition, so a change
in the machine's load meets plain and captured pictures alike. Pipelines (random weights but for `mini`):

- mini: the shipped generator, 64 x 64 pixels, batch 4;
- sd15-quarter: Stable Diffusion 1.5 with 2 of its 8 heads: 64 x 64 latents, 77 tokens, all 16 cross-attention layers,
  real head sizes (40, 80, 160, 160), but widths of 80 to 320 in place of 320 to 1280, so that two cores can run it.
  The convolutions shrink sixteenfold and the attention maps fourfold: the ratio is harder to hold than at full size;
- sd15: the full-size UNet, one denoising step on a CPU (2 text layers and the quarter's VAE, which capture never sees).

Where the package attention-map-diffusers (1.0, MIT) is installed, it is timed on the same layers and steps.
On a GPU, if there is one: sd15 in fp16 at batch 1, 4 and 8. No GPU was at hand when this was written.
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
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffseg.attention import AttentionRecorder
from diffseg.benchmarks.classes import VOC
from diffseg.drawing import draw_rows
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

# name -> heads (None: the shipped generator), and on a CPU: pictures at once, denoising steps, repetitions
PIPELINES = {"mini": (None, 4, 12, 7), "sd15-quarter": (2, 1, 4, 5), "sd15": (8, 1, 1, 3)}
GUIDANCE = 4.0


def build_sd15(heads: int) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1.5's shape with that many of its 8 heads, and random weights."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("mini")  # the words do not matter here, their number of positions does
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(heads * size for size in (40, 80, 160, 160)),
        attention_head_dim=heads,  # in diffusers the number of heads, for a UNet of SD 1.x
        cross_attention_dim=768,
        norm_num_groups=4 * heads,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(name: str) -> StableDiffusionPipeline:
    heads = PIPELINES[name][0]
    return load_generator(name) if heads is None else build_sd15(heads)


def prompts_for(pipeline, count: int) -> list[Prompt]:
    words = select_words(load_words("voc"), pipeline.tokenizer)
    return augment(words, count, templates=["a photo of {} {place}"], places=["on the grass"])


def options_for(pipeline, steps: int) -> SynthesisOptions:
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return SynthesisOptions(side, side, steps, GUIDANCE, (16,), "all", 0.2, "none")


def capture(pipeline, rows: Sequence[Prompt], options: SynthesisOptions, **how) -> AttentionRecorder:
    """Draw the rows with a recorder and read its maps; `how` goes to the recorder."""
    tokens = [key_positions(pipeline, row.prompt, row.spans) for row in rows]
    with AttentionRecorder(pipeline, tokens, **how) as recorder:
        draw_rows(pipeline, rows, options)
    recorder.maps()
    return recorder


def capture_by_peer(pipeline, rows: Sequence[Prompt], options: SynthesisOptions) -> None:
    """Draw the rows while the package attention-map-diffusers records every layer and step, and compute its maps."""
    from attention_map_diffusers import AttentionCapture

    with AttentionCapture(pipeline, timesteps="all") as recorder:
        draw_rows(pipeline, rows, options)
    recorder.compute()


def variants(pipeline, rows, options: SynthesisOptions, sam_checkpoint: str, sam_model: str) -> dict[str, Callable]:
    """Return the calls that are compared, by name, "plain" first.

    All captured ones record every denoising step, which is the dearest choice. A refiner that is not at hand is
    left out, and so is the package attention-map-diffusers.
    """
    levels = len(pipeline.unet.config.block_out_channels) - (pipeline.unet.config.sample_size == 16)
    every = [pipeline.unet.config.sample_size >> k for k in range(levels)]
    calls: dict[str, Callable] = {
        "plain": lambda: draw_rows(pipeline, rows, options),
        "capture 16": lambda: capture(pipeline, rows, options, resolutions=[16]),
        f"capture {'+'.join(map(str, every))}": lambda: capture(pipeline, rows, options, resolutions=every),
    }
    for refiner in refiners_at_hand(list(REFINERS), sam_checkpoint):
        own = dataclasses.replace(options, refiner=refiner, sam_checkpoint=sam_checkpoint, sam_model=sam_model)
        calls[f"capture 16, {refiner}"] = lambda own=own: draw_with_masks(pipeline, rows, VOC, own)
    if importlib.util.find_spec("attention_map_diffusers"):
        calls["capture of all layers"] = lambda: capture(pipeline, rows, options, resolutions=None)
        calls["attention-map-diffusers"] = lambda: capture_by_peer(pipeline, rows, options)
    return calls


def compare(calls: dict[str, Callable], pictures: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Time calls side by side, the first of them as the base; each call makes that many pictures.

    For each: seconds and cpu_seconds of a picture and images_per_second (medians), ratio and cpu_ratio to the base
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


def memory_here(name: str, steps: int, captured: bool) -> dict[str, int]:
    """Return this process's peak of resident memory after one call, and the recorder's own tensors, in bytes."""
    pipeline = build(name)
    rows, options = prompts_for(pipeline, 1), options_for(pipeline, steps)
    held = 0
    if captured:
        held = recorder_bytes(capture(pipeline, rows, options, resolutions=[8, 16], self_resolution=16))
    else:
        draw_rows(pipeline, rows, options)
    # getrusage would give the parent's peak where that is larger: it survives the start of a process
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return {"peak": int(peak.split()[1]) * 1024, "recorder": held}


def measure_memory(name: str, step_counts: Sequence[int]) -> list[dict]:
    """Measure peak memory for several numbers of steps, plain and captured, each in a process of its own."""
    found = []
    for steps in step_counts:
        for captured in (False, True):
            command = [
                sys.executable,
                "-m",
                "diffseg.experiments.speed.capture",
                "--memory",
                name,
                str(steps),
                str(int(captured)),
            ]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append({"steps": steps, "captured": captured, **json.loads(printed.splitlines()[-1])})
    return found


def measure_gpu(sam_checkpoint: str, sam_model: str) -> dict:
    """Compare on the GPU: sd15 in fp16 at batch 1, 4 and 8, 20 steps, and the GPU memory's peak for each."""
    pipeline = build("sd15").to("cuda", torch.float16)
    found = {}
    for batch in (1, 4, 8):
        rows, options = prompts_for(pipeline, batch), options_for(pipeline, 20)
        calls = variants(pipeline, rows, options, sam_checkpoint, sam_model)
        found[f"batch {batch}"] = compare(calls, batch, 5)
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats()
            call()
            found[f"batch {batch}"][name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=["mini", "sd15-quarter"])
    parser.add_argument("--repetitions", type=int, help="in place of each pipeline's own number")
    parser.add_argument("--sam-checkpoint", default="", help="file of Segment Anything's weights, to time that refiner")
    parser.add_argument("--sam-model", default="vit_b", help="which of its models the file holds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurements of memory")
    parser.add_argument("--output", type=Path, default=project_root() / "results" / "benchmarks" / "capture.json")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # the processes of measure_memory
    arguments = parser.parse_args()
    if arguments.memory:
        name, steps, captured = arguments.memory
        print(json.dumps(memory_here(name, int(steps), bool(int(captured)))))
        return
    report: dict = {"guidance_scale": GUIDANCE, "threads": torch.get_num_threads(), "pipelines": {}}
    for name in arguments.pipelines:
        _, batch, steps, repetitions = PIPELINES[name]
        repetitions = arguments.repetitions or repetitions
        pipeline = build(name)
        rows, options = prompts_for(pipeline, batch), options_for(pipeline, steps)
        calls = variants(pipeline, rows, options, arguments.sam_checkpoint, arguments.sam_model)
        print(f"{name}: batch {batch}, {steps} steps, {repetitions} repetitions of {', '.join(calls)}")
        compared = compare(calls, batch, repetitions)
        del pipeline, calls
        report["pipelines"][name] = {"batch": batch, "steps": steps, "repetitions": repetitions, "variants": compared}
        for variant, values in compared.items():
            print(f"  {variant:30} {values['images_per_second']:8.3f} images/s, time x {values['ratio']:.3f}, "
                  f"CPU time x {values['cpu_ratio']:.3f}")  # fmt: skip
        if not arguments.no_memory and name != "sd15":
            report["pipelines"][name]["memory"] = measure_memory(name, (5, 40) if name == "mini" else (1, 4))
    report["gpu"] = (
        measure_gpu(arguments.sam_checkpoint, arguments.sam_model)
        if torch.cuda.is_available()
        else "no GPU was at hand"
    )
    report |= provenance()
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(arguments.output)


if __name__ == "__main__":
    main()
