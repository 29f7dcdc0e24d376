"""Watch a training in TensorBoard (an extra package). It reads the network and changes nothing of the result."""

from collections.abc import Iterator, Mapping
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
    current weights (not their average, which `ema` keeps) and at one scale, that of `predict_labels`, and the
    predictions of its first images.
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
            network.eval()
            with torch.inference_mode():
                scores = score(self.predictions(step, network), self.benchmark, "single scale", bootstrap=1)
            network.train()
            self.writer.add_scalar("development/miou", scores.miou, step)
        self.writer.flush()  # the process may end without closing it

    def predictions(self, step: int, network: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield label and prediction (int64 H x W) of one development image after another, and show the first ones."""
        for number in range(len(self.development)):
            _, image, label, *_ = self.development[number]
            prediction = predict_labels(network, image[None].to(self.device), self.benchmark)[0].cpu()
            if number < SAMPLES:
                shown = overlay(image, prediction, class_colours([label, prediction], self.benchmark.classes))
                self.writer.add_image(f"prediction/{number}", shown, step, dataformats="HWC")
            yield label, prediction
