"""A training loop for the mini world's models: a budget of steps or seconds, an averaged copy, exact resumption."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffseg.files import atomic_path
from diffseg.lab.provenance import hardware, versions
from diffseg.miniworld import WEIGHTS


def mixed_precision(device: torch.device, precision: str = "bf16") -> torch.autocast:
    """Return the context of a forward pass in "bf16" (mixed precision) or "fp32"; weights stay float32 in both."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Trainer:
    """AdamW over a budget of steps, constant rate to 60 % and linear to 2 % of it; checkpoints that resume exactly.

    The decay follows the share of the budget that is used, so `--seconds` may replace `--steps` on an unknown machine.
    A larger budget after a finished one is a warm restart: the rate jumps from its end to what the schedule says at
    the share now used, without warm-up (to its peak when the budget is doubled, to half of it when a quarter is
    added), and falls again. Loss and average are worse until it has fallen, so judge only at the end of the budget.

    Weights, optimizer and average are always float32; BatchNorm's counters stay in the average as they began, for
    nothing reads them. precision, compiled: how `loss_of_batch` computes, for the record only: `phases` lists samples
    and seconds of each way of computing, in order. Compile modules in place (`module.compile()`), so that their state
    keeps its keys. A checkpoint may be continued on another device.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, torch.nn.Module],
        rate: float,
        decay: float,
        precision: str = "bf16",
        compiled: bool = False,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.modules, self.rate = folder, modules, rate
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }
        self.decay = decay
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.rng = np.random.default_rng(0)
        device = self.parameters[0].device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.how = {"device": name, "precision": precision, "compiled": compiled}
        self.phases: list[dict] = []
        if (folder / "checkpoint.pt").is_file():
            state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, values in self.average.items():
                for key, value in values.items():
                    value.copy_(state["average"][name][key])
            self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
            self.phases = state["phases"]
            torch.set_rng_state(state["torch_rng"])
            if device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], device)
            self.rng.bit_generator.state = json.loads(state["numpy_rng"])

    def save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "phases": self.phases,
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": json.dumps(self.rng.bit_generator.state),
        }
        if self.parameters[0].is_cuda:
            state["cuda_rng"] = torch.cuda.get_rng_state(self.parameters[0].device)
        with atomic_path(self.folder / "checkpoint.pt") as path:
            torch.save(state, path)

    def count(self, batch: int, seconds: float) -> None:
        """Add one step to the totals and to the phase of this way of computing."""
        how = self.how | {"batch": batch}
        if not self.phases or not how.items() <= self.phases[-1].items():
            self.phases.append(how | {"samples": 0, "seconds": 0.0})
        self.phases[-1]["samples"] += batch
        self.phases[-1]["seconds"] += seconds
        self.step, self.samples, self.seconds = self.step + 1, self.samples + batch, self.seconds + seconds

    def run(self, loss_of_batch, steps: int, seconds: float, batch: int, every: int, watch=None) -> None:
        """Call `loss_of_batch(rng)` until the budget is used: `steps`, or `seconds` of training where given."""
        bar = tqdm(total=1000, desc=self.folder.name, unit="‰")
        total, since = torch.zeros((), device=self.parameters[0].device), time.monotonic()
        first = self.step  # of the total: a budget may have ended between two rows
        states = [module.state_dict() for module in self.modules.values()], self.average.values()
        values, average = ([v for state in some for v in state.values() if v.is_floating_point()] for some in states)
        while True:
            used = self.seconds / seconds if seconds else self.step / steps
            if used >= 1:
                break
            for group in self.optimizer.param_groups:
                warm = min(1, (self.step + 1) / 200)
                group["lr"] = self.rate * warm * (1 if used < 0.6 else 1 - 0.98 * (used - 0.6) / 0.4)
            loss = loss_of_batch(self.rng)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            with torch.no_grad():
                weight = min(self.decay, (self.step + 1) / (self.step + 10))
                torch._foreach_lerp_(average, values, 1 - weight)
            total += loss.detach()  # stays on the device: reading it would make a GPU wait for every step
            now = time.monotonic()
            self.count(batch, now - since)
            since = now
            bar.update(round(1000 * used) - bar.n)
            if self.step % every == 0:
                mean = total.item() / (self.step - first)
                if not np.isfinite(mean):
                    raise FloatingPointError(f"the loss is not finite at step {self.step}; lower --rate and resume")
                row = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1)}
                row |= {
                    "loss": round(mean, 5),
                    "rate": round(self.optimizer.param_groups[0]["lr"], 7),
                }
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix(step=self.step, loss=f"{mean:.4f}", refresh=False)
                total.zero_()
                first = self.step
                self.save()
                if watch is not None:
                    watch(self)
        self.save()
        bar.close()

    def load_average(self) -> None:
        """Put the averaged weights into the modules."""
        for name, module in self.modules.items():
            module.load_state_dict(self.average[name])


def parser_of(
    description: str, rate: float, folder: str, weights: str, stages: Sequence[str] = ("train", "export")
) -> argparse.ArgumentParser:
    """Return the options that the trainings share. folder: below results/runs; weights: below the mini world's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--folder", type=Path, default=Path("results/runs") / folder, help="checkpoint and log")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / weights, help="where export writes")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument(
        "--seconds", type=float, default=0, help="seconds of training instead of steps; raise it to go on after the end"
    )
    parser.add_argument("--batch", type=int, default=16, help="scenes of a step")
    parser.add_argument("--rate", type=float, default=rate, help="AdamW's peak learning rate")
    parser.add_argument("--decay", type=float, default=0.998, help="decay of the weights' average")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes (corpus: 0 is one a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def training_note(recipe: str, folder: Path, state: dict, *networks: torch.nn.Module) -> dict:
    """Return what is to be known of a training whose checkpoint is `state`: budget, hardware, versions, loss curve."""
    path = folder / "log.jsonl"  # absent after fewer steps than lie between two checkpoints
    log = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {
        "recipe": recipe,
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "samples_seen": state["samples"],
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "batch": state["samples"] // state["step"],
        "phases": [phase | {"seconds": round(phase["seconds"], 1)} for phase in state["phases"]],
        "peak_learning_rate": max((row["rate"] for row in log), default=None),
        "hardware": hardware(),
        "versions": versions(),
        "loss_curve": [[row["samples"], row["loss"]] for row in log],
    }
