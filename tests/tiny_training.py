"""A training of seconds: pictures of two halves, options, how it is compared; and trainings that are only recorded."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffseg.files import MANIFEST, write_text
from diffseg.reliability import rank_within_class
from diffseg.segmenters import new_networks
from diffseg.training import train
from diffseg.training_options import NETWORKS, TrainingOptions

CLASSES = ("background", "thing")
OPTIONS = TrainingOptions(
    iterations=12,
    training_batch=4,
    crop=32,
    scale_jitter=(0.9, 1.1),
    colour_jitter=0.1,
    learning_rate=2e-3,
    weight_decay=1e-4,
    precision="fp32",
    workers=0,
)
STEP4 = dataclasses.asdict(OPTIONS) | {  # what a study of paired seeds reads of step 4's parameters
    "training_mode": "cotrain",
    "training_precision": "fp32",
    "segmenter": "unet-resnet18",
    "encoder_weights": "",
    "initial_network": "",
    "data_root": "",
    "training_split": "",
    "class_list": [],
}


def changed(**values) -> TrainingOptions:
    return dataclasses.replace(OPTIONS, **values)


def halves(count: int = 8, margin: bool = False) -> list[tuple]:
    """Pictures whose upper half is red and of class 1, the rest blue background; sure away from the edge."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :16], image[2, 16:] = 220, 220
    label = torch.zeros(32, 32, dtype=torch.int64)
    label[:16] = 1
    sure = (torch.arange(32) - 15.5).abs().mul(16).byte()[:, None].expand(32, 32).contiguous()
    reliability = [torch.stack([sure, rank_within_class(label, sure)])] if margin else []
    return [(f"picture_{k}", image, label, *reliability) for k in range(count)]


def trained(dataset, options=OPTIONS, seed=0, **more):
    network = new_networks(NETWORKS[options.training_mode], "upernet-swin-mini", CLASSES, seed)
    return network, train(network, dataset, 255, options, seed, **more)


def recording(monkeypatch: pytest.MonkeyPatch, study: ModuleType) -> list[SimpleNamespace]:
    """Let a study train nothing: return what it will have asked for. A network scores 10 + its seed, and the networks
    of a pair 110 and 210 + its seed; images are called by their split or run and their number."""
    calls, names = [], "folder name images parameters options dataset benchmark seed".split()

    def record(*given):
        calls.append(SimpleNamespace(**dict(zip(names, given, strict=True))))
        seed = calls[-1].seed
        return SimpleNamespace(seed=seed, networks=[SimpleNamespace(seed=seed + k) for k in (100, 200)])

    for name, value in {
        "trained": record,
        "score": lambda network, *_: 10.0 + network.seed,
        "scores": lambda network, *_: {"miou": 10.0 + network.seed},
        "data_folder": Path,
        "open_split": lambda benchmark, root, split: [f"{split} {k}" for k in range(100)],
        "pictures_set": lambda folder, benchmark: [f"{folder.parent.name} {k}" for k in range(6)],
        "Ensemble": SimpleNamespace,
    }.items():
        if hasattr(study, name):
            monkeypatch.setattr(study, name, value)
    return calls


def finish_images(run: Path) -> None:
    """Write the manifest of a run's images, without any: their key is "key of" its name."""
    for step, digest in (("03_drawing", "key of"), ("03_synthesis", run.name)):
        manifest = {"step": step, "key": "", "parameters": {}, "outputs": {"sha256": digest}}
        write_text(run / step / MANIFEST, json.dumps(manifest))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    weights = second.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in first.state_dict().items())
