"""A training loop for the mini world's models: a budget of steps or seconds, an averaged copy, exact resumption."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffseg.files import atomic_path
from diffseg.manifest import hardware, versions


def mixed_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


class Trainer:
    """AdamW over a budget of steps, constant rate to 60 % and linear to 2 % of it; checkpoints that resume exactly.

    The decay follows the share of the budget that is used, so `--seconds` may replace `--steps` on an unknown machine.
    """

    def __init__(self, folder: Path, modules: dict[str, torch.nn.Module], rate: float, decay: float):
        self.folder, self.modules, self.rate = folder, modules, rate
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {
            name: {key: value.detach().clone().float() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }
        self.decay = decay
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.rng = np.random.default_rng(0)
        if (folder / "checkpoint.pt").is_file():
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
            self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
            torch.set_rng_state(state["torch_rng"])
            self.rng.bit_generator.state = json.loads(state["numpy_rng"])

    def save(self) -> None:
        with atomic_path(self.folder / "checkpoint.pt") as path:
            torch.save(
                {
                    "modules": {name: module.state_dict() for name, module in self.modules.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "average": self.average,
                    "step": self.step,
                    "samples": self.samples,
                    "seconds": self.seconds,
                    "torch_rng": torch.get_rng_state(),
                    "numpy_rng": json.dumps(self.rng.bit_generator.state),
                },
                path,
            )

    def run(self, loss_of_batch, steps: int, seconds: float, batch: int, every: int, watch=None) -> None:
        """Call `loss_of_batch(rng)` until the budget is used: `steps`, or `seconds` of training where given."""
        bar = tqdm(total=1000, desc=self.folder.name, unit="‰")
        total, since = 0.0, time.monotonic()
        values = [value for module in self.modules.values() for value in module.state_dict().values()]
        average = [value for state in self.average.values() for value in state.values()]
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
            self.step, self.samples = self.step + 1, self.samples + batch
            self.seconds, since = self.seconds + time.monotonic() - since, time.monotonic()
            total += loss.item()
            bar.update(round(1000 * used) - bar.n)
            bar.set_postfix(step=self.step, loss=f"{loss.item():.4f}", refresh=False)
            if self.step % every == 0:
                if not np.isfinite(total):
                    raise FloatingPointError(f"the loss is not finite at step {self.step}; lower --rate and resume")
                row = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1)}
                row |= {
                    "loss": round(total / every, 5),
                    "rate": round(self.optimizer.param_groups[0]["lr"], 7),
                }
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                total = 0.0
                self.save()
                if watch is not None:
                    watch(self)
        self.save()
        bar.close()

    def load_average(self) -> None:
        """Put the averaged weights into the modules."""
        for name, module in self.modules.items():
            module.load_state_dict(self.average[name])


def training_note(recipe: str, folder: Path, state: dict, *networks: torch.nn.Module) -> dict:
    """Return what is to be known of a training whose checkpoint is `state`: budget, hardware, versions, loss curve."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "recipe": recipe,
        "parameters": sum(p.numel() for network in networks for p in network.parameters()),
        "samples_seen": state["samples"],
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "batch": state["samples"] // state["step"],
        "peak_learning_rate": max(row["rate"] for row in log),
        "hardware": hardware(),
        "versions": versions(),
        "loss_curve": [[row["samples"], row["loss"]] for row in log],
    }
