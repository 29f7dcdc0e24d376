"""What do the training modes cost beside the baseline? Each in turn, a few iterations at a time, at mini VOC's size.

python -m diffseg.experiments.speed.training      writes results/benchmarks/training.json

Every repetition trains each mode for the same few iterations, so a change in the machine's load meets all alike; a
ratio is the median over repetitions of mode / baseline. On a CPU the process's seconds count, on a GPU those of the
clock.
"""

import argparse
import dataclasses
import json
from functools import partial

import torch
from accelerate import PartialState

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.experiments.speed.capture import compare
from diffseg.files import write_text
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root
from diffseg.reliability import rank_within_class
from diffseg.segmenters import new_networks
from diffseg.training import train
from diffseg.training_options import NETWORKS, TrainingOptions


def measure(options: TrainingOptions, segmenter: str, pictures: int, repetitions: int) -> list[dict]:
    """Return a row a mode: networks, median seconds an iteration, median ratio to the baseline of the repetition."""
    device = PartialState().device
    real = open_split(VOC, data_folder("mini"), VOC.training_split)
    generator, dataset = torch.Generator().manual_seed(0), []
    for name, image, label, *_ in (real[k] for k in range(pictures)):  # ground truth, with margins of any size
        margin = torch.randint(256, label.shape, generator=generator, dtype=torch.uint8)
        dataset.append((name, image, label, torch.stack([margin, rank_within_class(label, margin)])))
    networks = {mode: new_networks(count, segmenter, VOC.classes, seed=0) for mode, count in NETWORKS.items()}
    calls = {}
    for mode, network in networks.items():
        chosen = dataclasses.replace(options, training_mode=mode)
        # it ends with numbers on the CPU, so a GPU's work is over, too
        calls[mode] = partial(train, network, dataset, VOC.ignore, chosen, 0, device, mode)
    clock = "" if device.type == "cuda" else "cpu_"
    return [
        {
            "mode": mode,
            "networks": NETWORKS[mode],
            "seconds_an_iteration": round(found[f"{clock}seconds"], 4),
            "ratio_to_baseline": round(found[f"{clock}ratio"], 3),
        }
        for mode, found in compare(calls, options.iterations, repetitions).items()  # the baseline is the first
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8, help="of each mode in a repetition")
    parser.add_argument("--segmenter", default="resunet-resnet10t")
    arguments = parser.parse_args()
    options = TrainingOptions(arguments.iterations, 16, 64, (0.9, 1.1), 0.1, 2e-3, 1e-4, "fp32", 0)
    rows = measure(options, arguments.segmenter, 64, arguments.repetitions)
    report = {
        "segmenter": arguments.segmenter,
        "batch": options.training_batch,
        "crop": options.crop,
        "warmup": options.warmup,
        "mixing": options.mixing,
        "threads": torch.get_num_threads(),
        "repetitions": arguments.repetitions,
        "iterations": arguments.iterations,
        "rows": rows,
        **provenance(),
    }
    write_text(project_root() / "results" / "benchmarks" / "training.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
