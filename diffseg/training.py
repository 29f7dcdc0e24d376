"""Train segmentation networks on images and (pseudo-)labels: one loop, five modes.

baseline   one network, cross-entropy on all pixels
ensemble   two baselines with different initial weights, averaged at test time: what two networks give alone
cotrain    two networks that teach each other where the labels are unreliable (BECO; `diffseg.cotraining`)
selftrain  one network that teaches itself there (our choice: half of the cost)
urn        one network that hardly listens where the label does not survive response scaling (URN)

All modes see the same images in the same order under the same augmentation, for the same iterations. Nothing in a step
depends on an earlier step's random state: step and image have seeds of their own. So an interrupted training resumes
exactly (in several processes up to running means, of which the first one's are kept), and the first network of an
ensemble is the baseline of the same seed.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffseg import cotraining as terms
from diffseg.augmentation import Augmented, shown_side
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, read_rows, write_rows
from diffseg.reliability import TAUGHT
from diffseg.seeds import derive_seed
from diffseg.segmenters import WEIGHTS, Ensemble, Segmenter, save_segmenter
from diffseg.training_options import NETWORKS, PRECISIONS, TrainingOptions
from diffseg.workers import threads

HISTORY = "history.csv"  # beside a trained network


def autocast(device: torch.device, options: TrainingOptions) -> torch.autocast:
    precision = PRECISIONS[options.precision]
    return torch.autocast(device.type, precision, enabled=precision is not None)


def mix(
    networks: Sequence[nn.Module],
    images: torch.Tensor,
    label: torch.Tensor,
    trusted: torch.Tensor,
    options: TrainingOptions,
    background: int | None,
    ignore: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boundary-enhanced mixing: paste half of the neighbour's classes, and label by both networks' mean.

    Each image of the batch receives with probability `options.mixing`. Returns images, label, trusted and the boundary
    band, as `cotraining.paste`; the networks are left in training mode. It must not run inside the autocast block of
    the pass that learns: autocast would keep the weights that it casts here, which have no gradient.
    """
    source = terms.partners(len(images))
    receives = torch.rand(len(images), generator=generator) < options.mixing
    receives &= source != torch.arange(len(images))  # an odd last one stays as it is
    region, online = torch.zeros_like(trusted), torch.full_like(label, ignore)
    if receives.any():
        with torch.no_grad(), autocast(images.device, options):
            logits = [network.eval()(images) for network in networks]
        for network in networks:
            network.train()
        online = terms.online_labels(logits, label, options.mixing_confidence, ignore)
        for row in receives.nonzero().flatten().tolist():
            region[row] = terms.half_of_the_classes(online[source[row]], background, ignore, generator)
    where = source.to(images.device), region, receives.to(images.device)
    return terms.paste(images, label, trusted, online, *where, ignore)


def answers_of(
    logits: Sequence[torch.Tensor],
    images: torch.Tensor,
    label: torch.Tensor,
    trusted: torch.Tensor,
    named: torch.Tensor | None,
    options: TrainingOptions,
    background: int | None,
) -> list[torch.Tensor]:
    """Return what each network tells the other (or itself), probabilities B x K x H x W without a gradient.

    named (bool B x K): the classes of each image, for peer_classes "image".
    """
    answers = [own.detach().float().softmax(dim=1) for own in logits]
    if options.peer_classes == "image":
        answers = [terms.restricted(answer, named, background) for answer in answers]
    if options.peer_refiner == "pamr":
        answers = [terms.edge_aware(answer, images, label, trusted) for answer in answers]
    return answers


def step_losses(
    logits: Sequence[torch.Tensor],
    label: torch.Tensor,
    trusted: torch.Tensor,
    band: torch.Tensor | None,
    answers: Sequence[torch.Tensor] | None,
    options: TrainingOptions,
    ignore: int,
) -> list[torch.Tensor]:
    """Return each network's loss by the mode.

    answers: what each network tells the other, or a single one itself. None until the warm-up is over, as what an
    untrained network says is noise, and in modes without answers.
    """
    if options.training_mode == "urn":
        return [terms.weighted_loss(own, label, trusted, ignore, options.uncertain_weight) for own in logits]
    if options.training_mode not in TAUGHT or (answers is None and options.warmup_pixels == "all"):
        return [terms.baseline_loss(own, label, ignore) for own in logits]
    losses = [terms.reliable_loss(own, label, trusted, ignore, band, options.band_weight) for own in logits]
    if answers is not None:
        is_soft = options.peer_target == "soft"
        for k, own in enumerate(logits):
            losses[k] = losses[k] + terms.peer_loss(own, answers[k - 1], label, trusted, ignore, is_soft)
    return losses


class Learner:
    """All that a step of the training changes: the network, its optimizer and loss scaler, the average, the history."""

    def __init__(self, network: Segmenter | Ensemble, options: TrainingOptions, device: torch.device):
        self.network, self.options = network, options
        self.optimizer = make_optimizer(network, options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.average = {key: value.clone() for key, value in network.state_dict().items()} if options.ema else {}
        self.history: dict[str, list[float]] = {}

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return len(self.history.get("loss", ()))

    def learn(self, loss: torch.Tensor) -> None:
        """Take one optimizer step down the loss, and let the average follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * (1 - self.steps / self.options.iterations) ** 0.9
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            update_average(self.average, self.network, min(self.options.ema, (1 + self.steps) / (10 + self.steps)))

    def record(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def save(self, path: Path, recipe: str) -> None:
        """Write a checkpoint; the recipe says to which training it belongs."""
        parts = {"network": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        state = {name: part.state_dict() for name, part in parts.items()}
        with atomic_path(path) as temporary:
            torch.save(state | {"recipe": recipe, "average": self.average, "history": self.history}, temporary)

    def resume(self, path: Path, recipe: str, device: torch.device) -> None:
        """Take over a checkpoint of this very training; any other, or a damaged one, raises a DiffsegError."""
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            is_same = saved["recipe"] == recipe
        except Exception as error:  # truncated and foreign files come as many kinds of exception
            raise DiffsegError(f"{path} is no usable checkpoint ({error}); delete it to train from scratch") from error
        if not is_same:
            raise DiffsegError(f"{path} belongs to a training with other options; delete it to train from scratch")
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.average, self.history = saved["average"], saved["history"]


def train(
    network: Segmenter | Ensemble,
    dataset: Dataset,
    ignore: int,
    options: TrainingOptions,
    seed: int,
    device: str | torch.device = "cpu",
    title: str = "training",
    checkpoint: Path | None = None,
    watch: Callable[[int, nn.Module, dict[str, float]], None] | None = None,
) -> dict[str, list[float]]:
    """Train a network (an ensemble of two where the mode has two) in place, and return the history.

    AdamW, or SGD with momentum 0.9 (BECO), under the poly schedule (power 0.9, DeepLab). The history has a value an
    iteration of: loss (mean of the networks'), valid (share of the pixels that are not ignored) and, as shares of the
    valid pixels, trusted (after the warm-up taught by their own label at full weight), contradicted (the first
    network's argmax is not the label) and, of two networks, disagreement (their argmax differ). Images with pasted
    objects, which the networks label, do not count for the first two (nan where there are no others).

    checkpoint: a file that is written every `options.checkpoint_every` iterations and at the end; where it is there
    the training resumes from it, on a CPU bit-identical. watch: called by the main process after each step with its
    number (from 1), the network and the step's values. Under `accelerate launch` the batch is divided among the
    processes.
    Raises a DiffsegError that names iteration and images when the loss is not finite (the last checkpoint stays), and
    one when no pixel of the set has a label.
    """
    networks, state, device = networks_of(network, options), PartialState(), torch.device(device)
    background = network.classes.index("background") if "background" in network.classes else None
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("workers", "checkpoint_every")}
    recipe = json.dumps([kept, seed, len(dataset), network.name, network.classes])
    network.to(device, memory_format=torch.channels_last)  # faster on a CPU (results/tables/networks.csv)
    learner = Learner(network.train(), options, device)
    if checkpoint and checkpoint.is_file():
        learner.resume(checkpoint, recipe, device)
    parallel = data_parallel(networks, state)
    batches = batches_from(learner.steps, Augmented(dataset, ignore, options, seed), options, state)
    count, epoch = options.iterations, -(-len(dataset) // options.training_batch)
    bar = tqdm(batches, title, count, initial=learner.steps, unit="step", disable=not state.is_main_process)
    for step, (names, *tensors) in enumerate(bar, start=learner.steps):
        images, label, trusted = (each.to(device) for each in tensors)
        drawn, band, named, answers = label, None, None, None
        is_taught = options.training_mode in TAUGHT and step >= options.warmup * count  # by a network
        if is_taught and options.peer_classes == "image":  # before anything is pasted
            named = terms.classes_of_images(label, len(network.classes))
        torch.manual_seed(derive_seed(seed, "step", step, state.process_index))  # for dropout
        if is_taught and options.mixing:
            generator = torch.Generator().manual_seed(derive_seed(seed, "mixing", step, state.process_index))
            images, label, trusted, band = mix(networks, images, label, trusted, options, background, ignore, generator)
        with autocast(device, options):
            logits = [each(images) for each in parallel]
        if is_taught:
            answers = answers_of(logits, images, label, trusted, named, options, background)
        losses = step_losses(logits, label, trusted, band, answers, options, ignore)
        learner.learn(finite_sum(losses, step, names))
        learner.record(values := measures(losses, logits, label, trusted, drawn, ignore))
        if watch and state.is_main_process:
            watch(step + 1, network, values)
        if step + 1 == min(count, epoch) and not any(learner.history["valid"]):
            raise DiffsegError("no pixel of the training set has a label that counts; look at its label maps")
        bar.set_postfix(loss=f"{np.mean(learner.history['loss'][-50:]):.3f}", refresh=False)
        is_due = (step + 1) % options.checkpoint_every == 0 or step + 1 == count
        if checkpoint and is_due and state.is_main_process:
            learner.save(checkpoint, recipe)
    if learner.average:
        network.load_state_dict(learner.average)
    network.eval()
    return learner.history


def train_once(
    folder: Path,
    make_network: Callable[[], Segmenter | Ensemble],
    dataset: Dataset,
    ignore: int,
    options: TrainingOptions,
    seed: int,
    device: str | torch.device = "cpu",
    title: str = "training",
    watch: Callable[[int, nn.Module, dict[str, float]], None] | None = None,
) -> dict[str, list[float]]:
    """Return the history of the network in `folder`; where there is no network, train one and save it there first.

    make_network: returns the untrained network; the other arguments are those of `train`. The history is saved as
    HISTORY, a row an iteration. The checkpoint is `<folder>.checkpoint.pt`, and stays: only the caller knows when
    nothing more can fail.
    """
    if not (folder / WEIGHTS).is_file():
        network, state = make_network(), PartialState()
        some = range(0, len(dataset), max(1, len(dataset) // 100))  # photographs have many shapes
        network.side = median_low(shown_side(dataset[k][1].shape[1:], options) for k in some)
        checkpoint = folder.with_name(f"{folder.name}.checkpoint.pt")
        with threads(options.threads):  # another number of threads adds in another order
            history = train(network, dataset, ignore, options, seed, device, title, checkpoint, watch)
        if state.is_main_process:  # each process has running means of its own in the normalisation layers
            rows = zip(*history.values(), strict=True)
            write_rows(folder / HISTORY, [dict(zip(history, row, strict=True)) for row in rows])
            save_segmenter(network, folder)
        state.wait_for_everyone()
    rows = read_rows(folder / HISTORY)
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def networks_of(network: Segmenter | Ensemble, options: TrainingOptions) -> list[Segmenter]:
    """Return the networks to train; a number that does not fit the mode raises a DiffsegError."""
    networks = list(network.networks) if isinstance(network, Ensemble) else [network]
    if len(networks) != NETWORKS[options.training_mode]:
        raise DiffsegError(
            f"training_mode {options.training_mode} trains {NETWORKS[options.training_mode]} network(s), "
            f"not {len(networks)}; make them with diffseg.segmenters.new_networks"
        )
    return networks


def data_parallel(networks: list[Segmenter], state: PartialState) -> list[nn.Module]:
    if state.num_processes == 1:
        return networks
    # Swin has a norm that the decoders here do not read
    return [nn.parallel.DistributedDataParallel(each, find_unused_parameters=True) for each in networks]


def batches_from(first: int, augmented: Augmented, options: TrainingOptions, state: PartialState) -> DataLoader:
    """Return this process's part of the batches of steps `first`, first + 1, ... to the last."""
    batch, mine = options.training_batch, slice(state.process_index, None, state.num_processes)
    numbers = [range(batch * k, batch * (k + 1))[mine] for k in range(first, options.iterations)]
    return DataLoader(augmented, batch_sampler=numbers, num_workers=options.workers)


def finite_sum(losses: Sequence[torch.Tensor], step: int, names: Sequence[str]) -> torch.Tensor:
    """Return the sum of the losses; one that is not finite raises a DiffsegError with iteration and images."""
    loss = torch.stack(list(losses)).sum()
    if not torch.isfinite(loss):
        raise DiffsegError(
            f"the loss is not finite at iteration {step} (images {', '.join(names)}); "
            "lower learning_rate, and look at these images and labels"
        )
    return loss


def make_optimizer(network: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), options.learning_rate, momentum=0.9, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=options.weight_decay)


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], network: nn.Module, decay: float) -> None:
    """Move the exponential moving average towards the network's weights; counters are copied."""
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


@torch.no_grad()
def measures(
    losses: Sequence[torch.Tensor],
    logits: Sequence[torch.Tensor],
    label: torch.Tensor,
    trusted: torch.Tensor,
    drawn: torch.Tensor,
    ignore: int,
) -> dict[str, float]:
    """Return what `train` records of one iteration, of this process's part of the batch. drawn: the labels before
    anything was pasted."""
    valid, seen = label != ignore, [each.argmax(dim=1) for each in logits]
    own = valid & (label == drawn).all(dim=(1, 2), keepdim=True)
    shares = {"trusted": (trusted, own), "contradicted": (seen[0] != label, own)}
    if len(seen) == 2:
        shares["disagreement"] = (seen[0] != seen[1], valid)
    mean, valid_share = float(torch.stack(list(losses)).mean()), float(valid.float().mean())
    nothing = float("nan") if valid.any() else 0.0
    return {"loss": mean, "valid": valid_share} | {
        name: int((pixels & among).sum()) / int(among.sum()) if among.any() else nothing
        for name, (pixels, among) in shares.items()
    }
