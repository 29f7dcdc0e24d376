"""What would the paper's scale cost? GPU hours and disk, from what can be counted and measured without running it.

python -m diffseg.experiments.speed.paper_scale      writes results/benchmarks/paper_scale.json and prints its table

torch counts the operations of the real classes without weights, a multiplication and an addition being two. GPU hours
are operations over an ASSUMED throughput (PEAK, SUSTAINED): no GPU was used. Not counted: files and augmentation, what
capture adds (capture.json), idle time. Bytes of images follow from those of mini VOC's last run.
"""

import functools
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import to_dtype, to_image

from diffseg.benchmarks.classes import get_benchmark
from diffseg.errors import DiffsegError
from diffseg.experiments.full_size import sd15_networks
from diffseg.experiments.speed.capture import build_sd15
from diffseg.files import write_text
from diffseg.generator import load_generator
from diffseg.lab.batch import resolve, step_notebooks, step_parameters
from diffseg.lab.provenance import provenance
from diffseg.lab.report import markdown
from diffseg.lora import target_layers
from diffseg.paths import project_root
from diffseg.refiners import get_refiner
from diffseg.segmenters import Segmenter
from diffseg.training_options import NETWORKS

RUNS = ("voc", "imagenet-s", "cityscapes")
PEAK = {"fp16": 312e12, "bf16": 312e12, "fp32": 19.5e12}  # operations a second of an NVIDIA A100, dense (data sheet)
SUSTAINED = 0.4  # of the peak; our assumption
# validation images, and the size that a network reads: VOC's at most, ImageNet-S's assumed, Cityscapes' halves
VALIDATION = {"voc": (1449, 512, 512), "imagenet-s": (12419, 224, 320), "cityscapes": (500, 512, 1024)}
TRAINING = 3  # a training step costs three forward passes: the gradients by inputs and by weights are one each
TUNING = 2  # LoRA's frozen weights need no gradient; checkpointing repeats the forward pass
KINDS = {  # of the files of a synthetic image: suffix, how they are enlarged, how they are written
    "JPEGImages": ("jpg", Image.Resampling.BICUBIC, {"quality": 95, "subsampling": 0}),
    "SegmentationClass": ("png", Image.Resampling.NEAREST, {}),
    "Reliability": ("png", Image.Resampling.BICUBIC, {}),
    "ReliabilityRank": ("png", Image.Resampling.BICUBIC, {}),
}


def operations(call: Callable, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*inputs)
    return counter.get_total_flops()


def count_generator(text, unet, vae, height: int, width: int) -> dict[str, int]:
    """Return the operations of one image's pass through each network; all are on torch's default device, meta."""
    factor, tokens = 2 ** (len(vae.config.block_out_channels) - 1), text.config.max_position_embeddings
    latents = torch.empty(1, unet.config.in_channels, height // factor, width // factor)
    prompt = torch.empty(1, tokens, unet.config.cross_attention_dim)
    return {
        "text": operations(text, torch.zeros(1, tokens, dtype=torch.long)),
        "unet": operations(unet, latents, torch.tensor(1), prompt),
        "decoder": operations(vae.decode, latents),
        "encoder": operations(vae.encode, torch.empty(1, 3, height, width)),
    }


def picture_cost(counted: Mapping[str, int], steps: int) -> int:
    """Return the operations of a drawn image: guidance needs text and UNet with and without the prompt."""
    return 2 * counted["text"] + 2 * steps * counted["unet"] + counted["decoder"]


def training_cost(p: Mapping, mode: str, forward: int) -> float:
    """Return the operations of a training; co-training looks at the images to paste once more, after its warm-up."""
    looks = p["mixing"] * (1 - p["warmup"]) if mode == "cotrain" else 0
    return p["iterations"] * p["training_batch"] * NETWORKS[mode] * forward * (TRAINING + looks)


def stages(p: Mapping, counted: Mapping, validation: int, per_pixel: Mapping, crf: list) -> list[dict]:
    """Return a run's rows: stage, what, gpu_hours, cpu_hours, gigabytes.

    cpu_hours and gigabytes are [least, most]. p: resolved parameters. counted: `count`. per_pixel: bytes [least, most]
    of each kind of file. crf: seconds [least, most] of a pixel on one core.
    """
    rows = []

    def add(stage: str, what: str, work: Mapping[str, float], disk=(0.0, 0.0), cpu=(0.0, 0.0)) -> None:
        gpu = sum(value / (PEAK[precision] * SUSTAINED) / 3600 for precision, value in work.items())
        rows.append({"stage": stage, "what": what, "gpu_hours": gpu, "cpu_hours": list(cpu), "gigabytes": list(disk)})

    networks, pixels, steps = NETWORKS[p["training_mode"]], p["height"] * p["width"], p["sampling_steps"]
    if p["target_images"]:
        each, seen = counted["lora"], p["lora_steps"] * p["lora_batch"]
        drawn, copies = (1 + p["lora_candidates"]) * p["lora_pictures"], 1 + p["lora_candidates"]
        what = f"{p['lora_steps']:,} LoRA steps of {p['lora_batch']}, {p['lora_height']} x {p['lora_width']}"
        tuning = {p["lora_precision"]: seen * (TUNING + p["lora_gradient_checkpointing"]) * each["unet"]}
        add("02 tuning", what, tuning, [copies * each["bytes"] / 1e9] * 2)
        around = seen * (each["text"] + each["encoder"]) + drawn * picture_cost(each, steps)
        add("02 around it", f"{seen:,} images encoded, {drawn} drawn, in fp32", {"fp32": around})
    what = f"{p['images']:,} images, {steps} steps, {p['height']} x {p['width']}"
    size = [p["images"] * pixels * sum(bounds[k] for bounds in per_pixel.values()) / 1e9 for k in (0, 1)]
    work = {p["generator_precision"]: p["images"] * picture_cost(counted, steps)}
    add("03 images, masks", what, work, size)
    if p["refiner"] == "crf":
        cpu = [p["images"] * pixels * seconds / 3600 for seconds in crf]
        add("03 dense CRF", "the same, on CPU cores beside the GPU", {}, cpu=cpu)
    each_step = f"{p['iterations']:,} steps of {p['training_batch']}, {p['crop']} x {p['crop']}"
    optimizer = 1 if p["optimizer"] == "sgd" else 2  # momentum, or two moments, of each weight in a checkpoint
    for stage, mode in [("04 synthetic", p["training_mode"]), ("04 real", "baseline")][: 1 + p["train_real"]]:
        saved = NETWORKS[mode] * counted["bytes"] / 1e9
        work = {p["training_precision"]: training_cost(p, mode, counted["segmenter"])}
        add(stage, f"{mode}, networks: {NETWORKS[mode]}; {each_step}", work, [saved, saved * (2 + optimizer)])
    seen = validation * len(p["evaluation_scales"]) * (1 + p["evaluation_flip"]) * (networks + p["train_real"])
    what = f"{validation:,} images, networks: {networks + p['train_real']}; in fp32"
    add("05 evaluation", what, {"fp32": seen * counted["whole"]})
    return rows


@functools.cache
def count_sd15(height: int, width: int) -> dict[str, int]:
    with torch.device("meta"):
        return count_generator(*sd15_networks(), height, width)


def count(p: Mapping, height: int, width: int) -> dict:
    """Return what the networks of a run's parameters cost; height x width is what the evaluated network reads."""
    found: dict = {**count_sd15(p["height"], p["width"])}
    with torch.device("meta"):
        network = Segmenter(p["segmenter"], get_benchmark(p["benchmark"]).classes).eval()
        found["segmenter"] = operations(network, torch.empty(1, 3, p["crop"], p["crop"]))
        found["whole"] = operations(network, torch.empty(1, 3, height, width))
        found["bytes"] = 4 * sum(weight.numel() for weight in network.parameters())
        if p["target_images"]:
            layers = target_layers(sd15_networks()[1], p["lora_targets"])
            thin = 4 * p["lora_rank"] * sum(map(sum, layers.values()))
            found["lora"] = {**count_sd15(p["lora_height"], p["lora_width"]), "bytes": thin}
    return found


def bytes_per_pixel(folder: Path, pictures: int = 60) -> dict[str, list[float]]:
    """Return for each kind of file [least, most] bytes a pixel: of a run's images enlarged eightfold, as they are.

    An enlarged emoji is smoother than a photograph of that size; a small image holds more in each pixel. What a
    black image takes is taken off: the file's header does not grow.
    """
    found = {}
    for kind, (suffix, how, options) in KINDS.items():
        paths, sizes = sorted((folder / kind).glob(f"*.{suffix}")), []
        if not paths:
            raise DiffsegError(f"{folder / kind} holds no image; run `diffseg run mini-voc` first.")

        def size(picture: Image.Image, suffix: str = suffix, options: Mapping = options) -> float:
            file = io.BytesIO()
            picture.save(file, Image.EXTENSION[f".{suffix}"], **options)
            return len(file.getvalue()) / picture.width / picture.height

        for path in paths[:: max(1, len(paths) // pictures)]:
            small = Image.open(path)
            header = size(small.point(lambda _: 0))
            sizes.append((size(small.resize((8 * small.width, 8 * small.height), how)), size(small) - header))
        found[kind] = [sum(column) / len(sizes) for column in zip(*sizes, strict=True)]
    return found


def crf_seconds(folder: Path, side: int = 512) -> list[float]:
    """Return [least, most] seconds of one core a pixel of the dense CRF: on a run's image enlarged, and on noise."""
    torch.manual_seed(0)
    picture = Image.open(next((folder / "JPEGImages").glob("*.jpg"))).resize((side, side), Image.Resampling.BICUBIC)
    found, refine = [], get_refiner("crf")
    for image in (to_dtype(to_image(picture), torch.float32, scale=True), torch.rand(3, side, side)):
        start = time.process_time()
        refine(image, image[:1], 0.2, None)
        found.append((time.process_time() - start) / side**2)
    return sorted(found)


def checks(results: Path) -> list[dict]:
    """Return what the same counting says of work that was timed: {work, operations, seconds, per_second, file}."""
    capture = json.loads((results / "benchmarks" / "capture.json").read_text())["pipelines"]
    found = []
    for name, pipeline in (("mini", load_generator("mini")), ("sd15-quarter", build_sd15(2))):
        side, steps = pipeline.unet.config.sample_size * pipeline.vae_scale_factor, capture[name]["steps"]
        with torch.device("meta"):
            parts = (each.to("meta") for each in (pipeline.text_encoder, pipeline.unet, pipeline.vae))
            cost = picture_cost(count_generator(*parts, side, side), steps)
        seconds = capture[name]["variants"]["plain"]["seconds"]
        found.append([f"{name}: an image, {side} x {side}, {steps} steps", cost, seconds, "benchmarks/capture.json"])
    file = "mini-voc/manifests/04_robust_training.json"
    manifest = json.loads((results / file).read_text())
    p = manifest["parameters"]
    with torch.device("meta"):
        network = Segmenter(p["segmenter"], get_benchmark(p["benchmark"]).classes).eval()
        forward = operations(network, torch.empty(1, 3, p["crop"], p["crop"]))
    work = f"mini VOC: two trainings, {p['iterations']} steps of {p['training_batch']}, {p['crop']} x {p['crop']}"
    cost = training_cost(p, p["training_mode"], forward) + training_cost(p, "baseline", forward)
    found.append([work, cost, manifest["metrics"]["training_seconds"], file])
    names = "work", "operations", "seconds", "file"
    return [dict(zip(names, row, strict=True)) | {"per_second": row[1] / row[2]} for row in found]


def table(report: Mapping) -> str:
    """Return the report's rows and their sums as a Markdown table."""
    lines = []
    for run, rows in report["runs"].items():
        whole = {"stage": "**all**", "what": "", "gpu_hours": sum(row["gpu_hours"] for row in rows)}
        for name in ("cpu_hours", "gigabytes"):
            whole[name] = [sum(row[name][k] for row in rows) for k in (0, 1)]
        for row in [*rows, whole]:
            line = {"run": run, "stage": row["stage"], "what is counted": row["what"]}
            line["GPU hours (estimate)"] = bounds(row["gpu_hours"], row["gpu_hours"])
            lines.append(line | {"CPU hours": bounds(*row["cpu_hours"]), "disk (GB)": bounds(*row["gigabytes"])})
    return markdown(lines)


def bounds(least: float, most: float) -> str:
    """Return "12 to 34", with few digits, as estimates deserve; "" for nothing."""
    low, high = (f"{value:.1f}" if value < 9.95 else f"{value:.0f}" for value in (least, most))
    if high == "0.0":
        return "< 0.1" if most else ""
    return high if low == high else f"{low} to {high}"


def check_table(report: Mapping) -> str:
    """Return what the same counting says of timed work, as a Markdown table."""
    return markdown(
        {
            "timed on two CPU cores": row["work"],
            "counted (10^9)": f"{row['operations'] / 1e9:,.0f}",
            "seconds": f"{row['seconds']:.1f}",
            "10^9 a second": f"{row['per_second'] / 1e9:.0f}",
            "seconds from": f"[{Path(row['file']).name}]({row['file']})",
        }
        for row in report["checks"]
    )


def parameters(run: str) -> dict:
    """Return all parameters of a run, from its file and the notebooks' defaults."""
    values, _ = resolve(run, {})
    return {k: v for notebook in step_notebooks().values() for k, v in step_parameters(notebook, values).items()}


def main() -> None:
    root = project_root()
    folder = root / "results" / "runs" / "mini-voc" / "03_synthesis"
    per_pixel, crf = bytes_per_pixel(folder), crf_seconds(folder)
    with torch.device("meta"):
        generator = 4 * sum(weight.numel() for network in sd15_networks() for weight in network.parameters())
    report = {
        "assumed": {"gpu": "NVIDIA A100", "peak": PEAK, "sustained": SUSTAINED, "run on a GPU": "nothing"},
        "bytes_per_pixel": per_pixel,
        "crf_seconds_per_pixel": crf,
        "generator_bytes": generator,
        "counted": {run: count(parameters(run), *VALIDATION[run][1:]) for run in RUNS},
    }
    report["runs"] = {
        run: stages(parameters(run), report["counted"][run], VALIDATION[run][0], per_pixel, crf) for run in RUNS
    }
    report |= {"checks": checks(root / "results")} | provenance()
    target = root / "results" / "benchmarks" / "paper_scale.json"
    report["measured"] = json.loads(target.read_text()).get("measured", []) if target.is_file() else []  # by rehearsal
    write_text(target, json.dumps(report, indent=1) + "\n")
    print(table(report), check_table(report), sep="\n\n")


if __name__ == "__main__":
    main()
