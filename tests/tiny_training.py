"""A training of seconds: pictures of two halves, options, and how it is compared."""

import dataclasses

import torch

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


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    weights = second.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in first.state_dict().items())
