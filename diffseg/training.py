"""Train segmentation networks on images and (pseudo-)labels: one loop, five modes.

baseline   one network, cross-entropy on all pixels
ensemble   two baselines with different initial weights, averaged at test time: what two networks give alone
cotrain    two networks that teach each other where the labels are unreliable (BECO; `diffseg.cotraining`)
selftrain  one network that teaches itself there (our choice: half of the cost)
urn        one network that hardly listens where the label does not survive response scaling (URN)

All modes see the same images in the same order under the same augmentation, for the same iterations. Nothing in a step
depends on an earlier step's random state: step and image have seeds of their own. So an interrupted training resumes
exactly, and the first network of an ensemble is the baseline of the same seed.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from diffseg import cotraining as terms
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, read_rows, write_rows
from diffseg.reliability import TAUGHT, margin_thresholds, trusted_pixels
from diffseg.seeds import derive_seed
from diffseg.segmenters import WEIGHTS, Ensemble, Segmenter, save_segmenter
from diffseg.workers import threads

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS = {"baseline": 1, "ensemble": 2, "cotrain": 2, "selftrain": 1, "urn": 1}  # training mode -> number of networks
OPTIMIZERS = ("adamw", "sgd")
# of cotrain and selftrain
RULES = ("picture", "set")  # of what the reliable share is taken
WARMUP_PIXELS = ("reliable", "all")  # which pixels' labels teach until the warm-up is over
PEER_CLASSES = ("all", "image")  # which classes a network may name to the other, or to itself
PEER_REFINERS = ("none", "pamr")  # what refines its answer
PEER_TARGETS = ("hard", "soft")  # its best class, or its probabilities
HISTORY = "history.csv"  # beside a trained network


@dataclass(frozen=True)
class TrainingOptions:
    """The constants of the training; the notebook's parameters of the same names explain each."""

    iterations: int
    training_batch: int
    crop: int
    scale_jitter: tuple[float, float]
    colour_jitter: float
    learning_rate: float
    weight_decay: float
    precision: str
    workers: int
    training_mode: str = "baseline"
    optimizer: str = "adamw"
    blur: float = 0.0
    ema: float = 0.0
    reliable_share: float = 0.5
    reliable_rule: str = "picture"
    warmup: float = 0.25
    warmup_pixels: str = "reliable"
    peer_classes: str = "all"
    peer_refiner: str = "none"
    peer_target: str = "hard"
    mixing: float = 0.5
    mixing_confidence: float = 0.95
    band_weight: float = 0.2
    urn_powers: tuple[float, ...] = (0.5, 0.6, 0.75, 1.33, 1.67, 2.0)
    uncertain_weight: float = 0.05
    beta: float = 0.2
    checkpoint_every: int = 100
    threads: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", PRECISIONS),
            ("training_mode", NETWORKS),
            ("optimizer", OPTIMIZERS),
            ("reliable_rule", RULES),
            ("warmup_pixels", WARMUP_PIXELS),
            ("peer_classes", PEER_CLASSES),
            ("peer_refiner", PEER_REFINERS),
            ("peer_target", PEER_TARGETS),
        ):
            if getattr(self, name) not in known:
                raise DiffsegError(f"there is no {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("blur", "warmup", "mixing", "mixing_confidence", "uncertain_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise DiffsegError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        if not 0 <= self.ema < 1:
            raise DiffsegError(f"ema is {self.ema}; give a decay from 0 (no average) to below 1")


class Augmented(Dataset):
    """The images of a training in the order in which it sees them: item k is the k-th image of all iterations.

    dataset: items (name, image uint8 3 x H x W, label int64 H x W) and, from a synthetic set, the reliability (uint8
    2 x H x W: margin and rank, or None). Items here are (name, image float32 3 x crop x crop in 0..1, label int64,
    trusted bool): scale, crop, flip, colour and blur are sampled from (seed, k) for image, label and trusted pixels
    together.
    """

    def __init__(self, dataset: Dataset, ignore: int, options: TrainingOptions, seed: int = 0):
        self.dataset, self.ignore, self.options, self.seed = dataset, ignore, options, seed
        generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
        count = options.iterations * options.training_batch
        epochs = -(-count // len(dataset))
        self.order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(epochs)])[:count]
        self.thresholds = None
        if options.training_mode in TAUGHT and options.reliable_rule == "set":
            items = (dataset[k][2:] for k in range(len(dataset)))
            pairs = ((label, more[0][0] if more and more[0] is not None else None) for label, *more in items)
            self.thresholds = margin_thresholds(pairs, options.reliable_share)
        strength = options.colour_jitter
        self.transform = v2.Compose(
            [
                v2.ScaleJitter((options.crop, options.crop), options.scale_jitter, antialias=True),
                v2.RandomCrop(options.crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: ignore}),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(strength, strength, strength, strength / 4),
                v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=options.blur),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.view(int(self.order[k]), k)

    def view(self, index: int, k: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return image `index` of the data set under the k-th augmentation."""
        name, image, label, *more = self.dataset[index]
        # on the whole image, so that a class keeps its share of reliable pixels wherever the crop falls
        trusted = trusted_pixels(label, more[0] if more else None, self.options, self.thresholds)
        masks = torch.stack([label, trusted.to(label.dtype)])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(derive_seed(self.seed, "augmentation", k))
            image, masks = self.transform(tv_tensors.Image(image), tv_tensors.Mask(masks))
        label, trusted = masks.as_subclass(torch.Tensor)
        return name, image.as_subclass(torch.Tensor), label, (trusted == 1) & (label != self.ignore)


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
    """Boundary-enhanced mixing: paste half of the neighbour's classes, by the networks' common labels.

    Each image of the batch receives with probability `options.mixing`. Returns images, label, trusted and the boundary
    band, as `cotraining.paste`; the networks are left in training mode. It must not run inside the autocast block of
    the pass that learns: autocast would keep the weights that it casts here, which have no gradient.
    """
    receives = torch.rand(len(images), generator=generator) < options.mixing
    source = terms.partners(len(images))
    region, online = torch.zeros_like(trusted), label.clone()
    if receives.any():
        wanted = source[receives].to(images.device)
        with torch.no_grad(), autocast(images.device, options):
            logits = [network.eval()(images[wanted]) for network in networks]
        for network in networks:
            network.train()
        labels = terms.online_labels(logits, label[wanted], options.mixing_confidence, ignore)
        for row, one in zip(receives.nonzero().flatten().tolist(), labels, strict=True):
            online[row] = one
            region[row] = terms.half_of_the_classes(one, background, ignore, generator)
    return terms.paste(images, label, trusted, images[source.to(images.device)], region, online)


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
    network's argmax is not the label) and, of two networks, disagreement (their argmax differ).

    checkpoint: a file that is written every `options.checkpoint_every` iterations and at the end; where it is there
    the training resumes from it, bit-identical. watch: called by the main process after each step with its number (from
    1), the network and the step's values. Under `accelerate launch` the batch is divided among the processes.
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
        band, named, answers = None, None, None
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
        learner.record(values := measures(losses, logits, label, trusted, ignore))
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
        network.side = shown_side(dataset[0][1].shape[1:], options)
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


def shown_side(size: tuple[int, int], options: TrainingOptions) -> int:
    """Return the shorter side, in pixels, at which a training shows images of `size` (height, width).

    Whatever the size on disk, an image is scaled until it fits into the crop, and then by a factor of `scale_jitter`
    (`Augmented`); of these factors it is the middle one on a logarithmic scale.
    """
    smallest, largest = options.scale_jitter
    return max(1, round(options.crop * min(size) / max(size) * (smallest * largest) ** 0.5))


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
    ignore: int,
) -> dict[str, float]:
    """Return what `train` records of one iteration."""
    valid, seen = label != ignore, [each.argmax(dim=1) for each in logits]
    shares = {"trusted": trusted & valid, "contradicted": (seen[0] != label) & valid}
    if len(seen) == 2:
        shares["disagreement"] = (seen[0] != seen[1]) & valid
    count = max(1, int(valid.sum()))
    mean = float(torch.stack(list(losses)).mean())
    valid_share = float(valid.float().mean())
    return {"loss": mean, "valid": valid_share} | {name: int(pixels.sum()) / count for name, pixels in shares.items()}
