"""What does capture cost full-size generators on a GPU? The part `gpu` of results/benchmarks/capture.json.

python -m diffseg.experiments.speed.capture_gpu      after `diffseg.experiments.speed.capture`, on a machine with a GPU

Random weights in half precision; the variants and their comparison are those of `capture`, which says what a ratio is.
Peak memory is that of the GPU.
"""

import gc
import json
from collections.abc import Callable

import torch
from diffusers import FluxPipeline

from diffseg.experiments.full_size import GENERATORS
from diffseg.experiments.speed.capture import (
    GUIDANCE,
    PEER,
    Shape,
    build_flux,
    captures,
    compare,
    options_for,
    prompts_for,
)
from diffseg.files import write_text
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root


def full_flux() -> FluxPipeline:
    """Return Flux schnell's transformer at full size, in bf16 from the start: float32 would not fit beside it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build_flux(24, 19, 38)
    finally:
        torch.set_default_dtype(torch.float32)


ON_GPU = {
    "sd15, batch 1": Shape(GENERATORS["sd15"], 512, (16, 64, 32, 8), 1, 20, 5, ()),
    "sd15, batch 8": Shape(GENERATORS["sd15"], 512, (16, 64, 32, 8), 8, 10, 3, ()),
    "sdxl": Shape(GENERATORS["sdxl"], 1024, (32, 64), 1, 5, 3, ()),
    "sd35-medium": Shape(GENERATORS["sd35-medium"], 1024, (64,), 1, 5, 3, ()),
    "flux-schnell": Shape(full_flux, 1024, (64,), 1, 4, 3, ()),
}


def timed_on_gpu(call: Callable) -> Callable:
    """Return the call with all of the GPU's work in it."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole


def measure_gpu(shape: Shape) -> dict:
    """Compare one of ON_GPU on the GPU, with the GPU memory's peak of each variant. The weights are random."""
    torch.manual_seed(0)
    with torch.device("cuda"):  # random weights of this size take minutes on a CPU
        pipeline = shape.build()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # its tables belong on the CPU
    pipeline.to("cuda", torch.bfloat16 if shape.build is full_flux else torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    rows, options, peaks = prompts_for(pipeline, shape.batch), options_for(shape), {}
    calls = {name: timed_on_gpu(call) for name, call in captures(pipeline, rows, options, shape).items()}
    for name, call in list(calls.items()):
        torch.cuda.reset_peak_memory_stats()
        try:
            call()
        except Exception as error:  # the peer does not serve every family in every mode; ours must
            if not name.startswith(PEER):
                raise
            peaks[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            del calls[name]
        else:
            peaks[name] = {"peak_bytes": torch.cuda.max_memory_allocated()}
        torch.cuda.empty_cache()
    compared = compare(calls, shape.batch, shape.repetitions)
    return {
        "guidance_scale": GUIDANCE,
        "batch": shape.batch,
        "steps": shape.steps,
        "side": shape.side,
        "repetitions": shape.repetitions,
        "variants": {name: compared.get(name, {}) | peaks[name] for name in peaks},
    }


def main() -> None:
    path = project_root() / "results" / "benchmarks" / "capture.json"
    report = json.loads(path.read_text())
    for name, shape in ON_GPU.items():
        report["gpu"][name] = measure_gpu(shape) | provenance()
        for variant, values in report["gpu"][name]["variants"].items():
            print(f"{name}, {variant}:", {key: values.get(key) for key in ("seconds", "ratio", "peak_bytes", "error")})
        gc.collect()  # a pipeline is in a circle of references
        torch.cuda.empty_cache()
        write_text(path, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
