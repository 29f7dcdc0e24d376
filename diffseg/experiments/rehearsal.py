"""A dress rehearsal of the runs at the paper's scale: their files, full-size networks, few images.

python -m diffseg.experiments.rehearsal voc --pictures 2 --steps 2

Runs notebooks 01 to 06 with voc.yaml, imagenet-s.yaml or cityscapes.yaml to their table. The generator has its
published size and random weights, the data set a few images of blocks at real sizes in the official layout, so the
scores mean nothing. Nothing is downloaded. Counts are lowered, and what this machine cannot do is changed; each change
is printed. Seconds of every step and the largest process's memory go to results/benchmarks/paper_scale.json.
"""

import argparse
import importlib.util
import json
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffseg.benchmarks.classes import Benchmark, get_benchmark
from diffseg.benchmarks.labels import write_label
from diffseg.experiments.full_size import GENERATORS, save_generator
from diffseg.files import MANIFEST, write_text
from diffseg.lab.batch import resolve, run
from diffseg.lab.provenance import provenance
from diffseg.lab.steps import STEPS
from diffseg.paths import project_root

RUNS = ("voc", "imagenet-s", "cityscapes")
SIZES = {  # (height, width) in turn
    "voc": [(375, 500), (500, 375), (333, 500)],
    "imagenet-s": [(375, 500), (500, 333), (400, 300)],
    "cityscapes": [(1024, 2048)],
}
# What a generator's shape asks for at the files' sizes: SDXL has no cross-attention at 64 x 64, SD 3.5 all of it at
# half of the latents' size. Only Stable Diffusion 1, 2 and XL can be tuned.
SHAPES = {
    "sd15": {},
    "sdxl": {"attention_resolutions": [16, 32]},
    "sd35-medium": {"attention_resolutions": [32], "target_images": ""},
}


def places(benchmark: Benchmark, split: str, k: int) -> tuple[str, str, str]:
    """Return name, image and label of a split's k-th item, in the official layout below the data root."""
    if benchmark.protocol == "voc":
        name = f"{2007 + list(benchmark.splits).index(split)}_{k:06d}"
        base = benchmark.folder
        return name, f"{base}/JPEGImages/{name}.jpg", f"{base}/SegmentationClass/{name}.png"
    if benchmark.protocol == "imagenet-s":
        tag, name, base = benchmark.classes[1 + k % (benchmark.num_classes - 1)], f"{split}_{k:08d}", benchmark.folder
        return f"{tag}/{name}", f"{base}/{split}/{tag}/{name}.JPEG", f"{base}/{split}-segmentation/{tag}/{name}.png"
    name = f"city_{k:06d}_000019"
    paths = [f"{kind}/{split}/city/{name}_{suffix}.png" for kind, suffix in
             (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))]  # fmt: skip
    return name, *paths


def write_data(root: Path, benchmark: Benchmark, pictures: int) -> None:
    """Write a few images of blocks, each block a class, for the splits that a run reads."""
    rng, sizes = np.random.default_rng(0), SIZES[benchmark.protocol]
    for split in (benchmark.training_split, benchmark.evaluation_split):
        names = []
        for k in range(pictures):
            name, image_path, label_path = places(benchmark, split, k)
            height, width = sizes[k % len(sizes)]
            blocks = rng.integers(0, benchmark.num_classes, (8, 8))
            label = np.kron(blocks, np.ones((height // 8 + 1, width // 8 + 1), np.int64))[:height, :width]
            grain = np.kron(rng.integers(0, 56, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8), np.int64))
            label[:4] = benchmark.ignore
            colours = rng.integers(0, 200, (max(benchmark.num_classes, benchmark.ignore) + 1, 3))
            pixels = (colours[label] + grain[:height, :width, None]).astype(np.uint8)
            (root / image_path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / image_path)
            write_label(root / label_path, label, benchmark)
            names.append(name)
        if benchmark.protocol == "voc":
            listing = root / benchmark.folder / "ImageSets" / "Segmentation" / f"{split}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(f"{name}\n" for name in names))


def changed(values: dict, generator: str, folder: Path, pictures: int, steps: int) -> dict[str, dict]:
    """Return what is changed in a file's values, by reason."""
    counts = {
        "images": pictures,
        "sampling_steps": steps,
        "grid_pictures": 2,
        "iterations": steps,
        "training_batch": 2,
    }
    found = {
        "counts": counts,
        "places": {"generator": str(folder / generator), "data_root": str(folder / "data")},
        "no download": {"encoder_weights": ""},
        "the generator's shape": dict(SHAPES[generator]),
        "this machine": {},
    }
    if values.get("target_images"):
        counts |= {"lora_steps": steps, "lora_batch": 1, "lora_candidates": 1, "lora_pictures": 2, "lora_held_out": 0.0}
        if "target_images" not in SHAPES[generator]:
            target = Path(values["target_images"]).relative_to(values["data_root"])
            found["places"]["target_images"] = str(folder / "data" / target)
    if importlib.util.find_spec("pydensecrf") is None and values.get("refiner") == "crf":
        found["this machine"]["refiner"] = "pamr"
    if torch.accelerator.is_available():
        counts["workers"] = min(2, os.cpu_count())
    else:
        found["this machine"]["workers"] = 0  # each would hold a copy of the generator
        names = ("generator_precision", "training_precision", "lora_precision")
        found["this machine"] |= {name: "fp32" for name in names if values.get(name, "fp32") != "fp32"}
    return {reason: those for reason, those in found.items() if those}


def rehearse(name: str, generator: str, folder: Path, pictures: int, steps: int) -> dict:
    """Run a parameter file in `folder`; return what was changed, seconds by step, memory, and how that was read."""
    values, _ = resolve(name, {})
    if not (folder / generator / "model_index.json").is_file():
        save_generator(generator, folder / generator)
    write_data(folder / "data", get_benchmark(values["benchmark"]), pictures)
    changes = changed(values, generator, folder, pictures, steps)
    for reason, those in changes.items():
        print(f"changed ({reason}):", ", ".join(f"{key}={value}" for key, value in those.items()), flush=True)
    made = run(
        name, changes={key: value for those in changes.values() for key, value in those.items()}, out=str(folder)
    )
    manifests = {step: json.loads((made / step / MANIFEST).read_text()) for step in STEPS}
    gpu = torch.accelerator.is_available()
    return {
        "run": name,
        "generator": f"{generator}, random weights",
        "machine": torch.cuda.get_device_name() if gpu else "CPU",
        "changed": {reason: those for reason, those in changes.items() if reason != "places"},
        "seconds": {step: manifest["seconds"] for step, manifest in manifests.items()},
        "largest_process_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 1),
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--generator", choices=GENERATORS, default="sd15")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of denoising, and of training")
    parser.add_argument(
        "--folder", type=Path, help="where all is kept; default: a temporary folder, removed at the end"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        report = rehearse(arguments.run, arguments.generator, folder, arguments.pictures, arguments.steps)
    path = project_root() / "results" / "benchmarks" / "paper_scale.json"
    whole = json.loads(path.read_text())
    others = [
        row
        for row in whole.get("measured", [])
        if (row["run"], row["generator"]) != (report["run"], report["generator"])
    ]
    whole["measured"] = [*others, report]
    write_text(path, json.dumps(whole, indent=1) + "\n")
    print(json.dumps(report["seconds"], indent=1), f"{report['largest_process_gb']} GB")


if __name__ == "__main__":
    main()
