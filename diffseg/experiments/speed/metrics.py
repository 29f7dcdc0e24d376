"""What does the metric cost beside decoding and a network? One image of 512 x 512 pixels at a time, 21 classes.

python -m diffseg.experiments.speed.metrics      writes results/benchmarks/metrics.json

Every repetition decodes an image and its label, predicts it, and counts it, so a change in the machine's load meets
all three alike; a share is the median over repetitions of metric / (decoding + network + metric). The bootstrap comes
once an evaluation: its time for 1,449 images (VOC val) is given by itself and an image's part is in the metric.
On a GPU if there is one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.evaluation import predict_labels
from diffseg.benchmarks.labels import write_label
from diffseg.benchmarks.metrics import ConfusionMatrix, ImageNetSScores, bootstrap_interval
from diffseg.benchmarks.readers import LabelledPictures
from diffseg.files import write_text
from diffseg.lab.provenance import provenance
from diffseg.paths import project_root
from diffseg.segmenters import Segmenter

SIDE = 512
VOC_VAL = 1449


def write_pictures(folder: Path, count: int) -> LabelledPictures:
    """Write textured images with blocks of classes as JPEG and palette PNG, and open them."""
    random = np.random.default_rng(0)
    items = []
    for k in range(count):
        label = np.kron(random.integers(0, VOC.num_classes, (8, 8)), np.ones((SIDE // 8, SIDE // 8), np.int64))
        label[:4] = VOC.ignore
        texture = np.clip(random.normal(8 * (label % 21) + 40, 12), 0, 255).astype(np.uint8)
        items.append((f"{k}", folder / f"{k}.jpg", folder / f"{k}.png"))
        Image.fromarray(np.stack([texture] * 3, axis=-1)).save(items[-1][1], quality=95)
        write_label(items[-1][2], label, VOC)
    return LabelledPictures(VOC, items)


def measure(network: torch.nn.Module, dataset: LabelledPictures, repetitions: int, device: torch.device) -> dict:
    """Return the medians of milliseconds an image of each part, and the metric's median share."""
    matrix, extra = ConfusionMatrix(VOC.num_classes, VOC.ignore), ImageNetSScores(VOC.num_classes, VOC.ignore)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for k in tqdm(range(repetitions + 2), network.name):  # the first two warm up
        times = [now()]
        _, image, label = dataset[k % len(dataset)]
        times.append(now())
        with torch.inference_mode():
            prediction = predict_labels(network, image[None].to(device), VOC)[0]
        label = label.to(device)
        times.append(now())
        matrix.update(label, prediction)
        times.append(now())
        extra.update(label, prediction)
        times.append(now())
        rows.append([1000 * (b - a) for a, b in zip(times, times[1:], strict=False)])
    start = time.perf_counter()
    bootstrap_interval((matrix.per_image * VOC_VAL)[:VOC_VAL], VOC.protocol)
    bootstrap = 1000 * (time.perf_counter() - start)
    rows = rows[2:]
    counted = [metric + bootstrap / VOC_VAL for _, _, metric, _ in rows]
    shares = [metric / (row[0] + row[1] + metric) for row, metric in zip(rows, counted, strict=True)]
    decode, predict, metric, imagenet_s = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "network": network.name,
        "decode_ms": round(decode, 3),
        "network_ms": round(predict, 3),
        "metric_ms": round(metric, 3),
        "bootstrap_ms_of_1449_pictures": round(bootstrap, 1),
        "metric_share": round(statistics.median(shares), 4),
        "imagenet_s_extras_ms": round(imagenet_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="images that are timed with each network")
    parser.add_argument("--networks", nargs="+", default=["deeplabv3plus-resnet18", "deeplabv3plus-resnet101"])
    arguments = parser.parse_args()
    device = PartialState().device
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_pictures(Path(folder), 4)
        networks = [Segmenter(name, VOC.classes).to(device).eval() for name in arguments.networks]
        rows = [measure(network, dataset, arguments.repetitions, device) for network in networks]
    report = {
        "pixels": [SIDE, SIDE],
        "classes": VOC.num_classes,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repetitions": arguments.repetitions,
        "rows": rows,
        **provenance(),
    }
    write_text(project_root() / "results" / "benchmarks" / "metrics.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
