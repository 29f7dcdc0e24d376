"""Watch a training in TensorBoard (an extra package). It reads the network and changes nothing of the result."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from diffseg.benchmarks.classes import Benchmark
from diffseg.benchmarks.evaluation import predict_labels, score
from diffseg.figures import class_colours, overlay

SAMPLES = 4  # predictions that are shown


@dataclass
class Watcher:
    """What `train` calls after each step with its number (from 1), the network and what it recorded of the step.

    Each step's values are written to `folder`; each `every` steps also mIoU (0..1) on the development split, with the
    current weights (not their average, which `ema` keeps), and the predictions of its first images.
    """

    folder: Path
    every: int
    development: Dataset | None
    benchmark: Benchmark
    device: str | torch.device

    @cached_property
    def writer(self) -> SummaryWriter:  # made by the process that trains
        return SummaryWriter(str(self.folder))

    def __call__(self, step: int, network: torch.nn.Module, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"training/{name}", value, step)
        if self.development is not None and step % self.every == 0:
            self.show_development(step, network)
        self.writer.flush()  # the process may end without closing it

    def show_development(self, step: int, network: torch.nn.Module) -> None:
        network.eval()
        pairs = []
        with torch.inference_mode():
            for number, (_, image, label, *_) in enumerate(self.development[k] for k in range(len(self.development))):
                prediction = predict_labels(network, image[None].to(self.device), self.benchmark)[0].cpu()
                pairs.append((label, prediction))
                if number < SAMPLES:
                    shown = overlay(image, prediction, class_colours([label, prediction], self.benchmark.classes))
                    self.writer.add_image(f"prediction/{number}", shown, step, dataformats="HWC")
        network.train()
        self.writer.add_scalar("development/miou", score(pairs, self.benchmark, "single scale", bootstrap=1).miou, step)
