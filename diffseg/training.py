"""Train segmentation networks on pictures and (pseudo-)labels: one loop, four modes.

plain      one network, cross-entropy on all pixels
ensemble   two plain networks with different initial weights, averaged at test time: what two networks give alone
cotrain    two networks that teach each other where the labels are unreliable (BECO; `diffseg.cotraining`)
urn        one network that hardly listens where the label does not survive response scaling (URN)

All modes see the same pictures in the same order under the same augmentation, for the same iterations. Nothing in a
step depends on an earlier step's random state: step and picture have seeds of their own. So a training that was cut
goes on exactly, and the first network of an ensemble is the plain network of the same seed.
"""

import dataclasses
import json
from collections.abc import Sequence
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
from diffseg.files import atomic_path
from diffseg.masks import margin_thresholds, reliable_pixels
from diffseg.seeds import derive_seed
from diffseg.segmenters import Ensemble, Segmenter

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS = {"plain": 1, "ensemble": 2, "cotrain": 2, "urn": 1}  # training mode -> number of networks
OPTIMIZERS = ("adamw", "sgd")
RULES = ("picture", "set")  # cotrain: of what the reliable share is taken


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
    training_mode: str = "plain"
    optimizer: str = "adamw"
    blur: float = 0.0
    ema: float = 0.0
    reliable_share: float = 0.5
    reliable_rule: str = "picture"
    warmup: float = 0.25
    mixing: float = 0.5
    mixing_confidence: float = 0.95
    band_weight: float = 0.2
    urn_powers: tuple[float, ...] = (0.5, 0.6, 0.75, 1.33, 1.67, 2.0)
    uncertain_weight: float = 0.05
    beta: float = 0.2
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", PRECISIONS),
            ("training_mode", NETWORKS),
            ("optimizer", OPTIMIZERS),
            ("reliable_rule", RULES),
        ):
            if getattr(self, name) not in known:
                raise DiffsegError(f"there is no {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("blur", "warmup", "mixing", "mixing_confidence", "uncertain_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise DiffsegError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        if not 0 <= self.ema < 1:
            raise DiffsegError(f"ema is {self.ema}; give a decay from 0 (no average) to below 1")


class Augmented(Dataset):
    """The pictures of a training in the order in which it sees them: item k is the k-th picture of all iterations.

    dataset: items (name, image uint8 3 x H x W, label int64 H x W) and, from a synthetic set, the reliability
    (uint8 H x W, or None). Items here are (name, image float32 3 x crop x crop in 0..1, label int64, trusted bool):
    scale, crop, flip, colour and blur are drawn from (seed, k) for picture, label and trusted pixels together.
    """

    def __init__(self, dataset: Dataset, ignore: int, options: TrainingOptions, seed: int = 0):
        self.dataset, self.ignore, self.options, self.seed = dataset, ignore, options, seed
        generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
        count = options.iterations * options.training_batch
        epochs = -(-count // len(dataset))
        self.order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(epochs)])[:count]
        self.thresholds = None
        if options.training_mode == "cotrain" and options.reliable_rule == "set":
            pairs = (
                (item[2], item[3] if len(item) > 3 else None) for item in map(dataset.__getitem__, range(len(dataset)))
            )
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
        """Return picture `index` of the data set under the k-th augmentation."""
        name, image, label, *margin = self.dataset[index]
        # on the whole picture, so that a class keeps its share of reliable pixels wherever the crop falls
        trusted = trusted_pixels(label, margin[0] if margin else None, self.options, self.thresholds)
        masks = torch.stack([label, trusted.to(label.dtype)])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(derive_seed(self.seed, "augmentation", k))
            image, masks = self.transform(tv_tensors.Image(image), tv_tensors.Mask(masks))
        label, trusted = masks.as_subclass(torch.Tensor)
        return name, image.as_subclass(torch.Tensor), label, (trusted == 1) & (label != self.ignore)


def trusted_pixels(
    label: torch.Tensor,
    margin: torch.Tensor | None,
    options: TrainingOptions,
    thresholds: dict[int, int] | None = None,
) -> torch.Tensor:
    """Return the pixels (bool H x W) of a whole picture whose label the mode trusts; without a margin all of them.

    thresholds: of the whole set's margins (`diffseg.masks.margin_thresholds`), for the reliable_rule "set".
    """
    if margin is not None and thresholds is not None:
        limits = torch.tensor([thresholds.get(value, 256) for value in range(int(label.max()) + 1)])
        return margin >= limits[label]
    if margin is not None and options.training_mode == "cotrain":
        return reliable_pixels(label, margin, options.reliable_share)
    if margin is not None and options.training_mode == "urn":
        return terms.certain_pixels(label, margin, options.urn_powers, options.beta)
    return torch.ones_like(label, dtype=torch.bool)


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

    Each picture of the batch receives with probability `options.mixing`. Returns images, label, trusted and the
    boundary band, as `cotraining.paste`; the networks are left in training mode.
    """
    receives = torch.rand(len(images), generator=generator) < options.mixing
    source = terms.partners(len(images))
    region, online = torch.zeros_like(trusted), label.clone()
    if receives.any():
        wanted = source[receives].to(images.device)
        with torch.no_grad():
            logits = [network.eval()(images[wanted]) for network in networks]
            for network in networks:
                network.train()
        labels = terms.online_labels(logits, label[wanted], options.mixing_confidence, ignore)
        for row, one in zip(receives.nonzero().flatten().tolist(), labels, strict=True):
            online[row] = one
            region[row] = terms.half_of_the_classes(one, background, ignore, generator)
    return terms.paste(images, label, trusted, images[source.to(images.device)], region, online)


def step_losses(
    logits: Sequence[torch.Tensor],
    label: torch.Tensor,
    trusted: torch.Tensor,
    band: torch.Tensor | None,
    is_warm: bool,
    options: TrainingOptions,
    ignore: int,
) -> list[torch.Tensor]:
    """Return each network's loss by the mode. Until the warm-up is over a co-trained network learns from reliable
    pixels only: what an untrained network says of the others is noise."""
    if options.training_mode == "urn":
        return [terms.weighted_loss(own, label, trusted, ignore, options.uncertain_weight) for own in logits]
    if options.training_mode != "cotrain":
        return [terms.plain_loss(own, label, ignore) for own in logits]
    losses = [terms.reliable_loss(own, label, trusted, ignore, band, options.band_weight) for own in logits]
    if is_warm:
        first, second = logits
        losses[0] = losses[0] + terms.peer_loss(first, second, label, trusted, ignore)
        losses[1] = losses[1] + terms.peer_loss(second, first, label, trusted, ignore)
    return losses


def train(
    network: Segmenter | Ensemble,
    dataset: Dataset,
    ignore: int,
    options: TrainingOptions,
    seed: int,
    device: str | torch.device = "cpu",
    title: str = "training",
    checkpoint: Path | None = None,
) -> dict[str, list[float]]:
    """Train a network (an ensemble of two where the mode has two) in place, and return the history.

    AdamW, or SGD with momentum 0.9 (BECO), under the poly schedule (power 0.9, DeepLab). The history has a value an
    iteration of: loss (mean of the networks'), valid (share of the pixels that are not ignored) and, as shares of the
    valid pixels, trusted (taught by their own label at full weight), contradicted (the first network's argmax is
    not the label) and, of two networks, disagreement (their argmax differ).

    checkpoint: a file that is written every `options.checkpoint_every` iterations and at the end; where it is there
    the training goes on from it, to the same bytes. Under `accelerate launch` the batch is divided among the
    processes. Raises a DiffsegError that names iteration and pictures when the loss is not finite (the last
    checkpoint stays), and one when no pixel of the set has a label.
    """
    networks = list(network.networks) if isinstance(network, Ensemble) else [network]
    if len(networks) != NETWORKS[options.training_mode]:
        raise DiffsegError(
            f"training_mode {options.training_mode} trains {NETWORKS[options.training_mode]} network(s), "
            f"not {len(networks)}; make them with diffseg.segmenters.new_networks"
        )
    state, device = PartialState(), torch.device(device)
    background = network.classes.index("background") if "background" in network.classes else None
    network.to(device).train()
    average = {key: value.clone() for key, value in network.state_dict().items()} if options.ema else {}
    optimizer = make_optimizer(network, options)
    precision = PRECISIONS[options.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    history: dict[str, list[float]] = {}
    first = 0
    recipe = json.dumps([dataclasses.asdict(options), seed, len(dataset), network.name, network.classes])
    if checkpoint and checkpoint.is_file():
        saved = read_checkpoint(checkpoint, recipe, device)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        first, history, average = saved["step"], saved["history"], saved["average"]
    if state.num_processes > 1:
        # Swin has a norm that the decoders here do not read
        networks = [nn.parallel.DistributedDataParallel(each, find_unused_parameters=True) for each in networks]

    batch, count = options.training_batch, options.iterations
    mine = slice(state.process_index, None, state.num_processes)
    loader = DataLoader(
        Augmented(dataset, ignore, options, seed),
        batch_sampler=[range(batch * k, batch * (k + 1))[mine] for k in range(first, count)],
        num_workers=options.workers,
    )
    bar = tqdm(loader, title, count, initial=first, unit="step", disable=not state.is_main_process)
    for step, (names, images, label, trusted) in enumerate(bar, start=first):
        torch.manual_seed(derive_seed(seed, "step", step, state.process_index))  # for dropout
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixing", step, state.process_index))
        images, label, trusted, band = images.to(device), label.to(device), trusted.to(device), None
        is_warm = step >= options.warmup * count
        with torch.autocast(device.type, precision, enabled=precision is not None):
            if options.training_mode == "cotrain" and is_warm and options.mixing:
                images, label, trusted, band = mix(
                    networks, images, label, trusted, options, background, ignore, generator
                )
            logits = [each(images) for each in networks]
        losses = step_losses(logits, label, trusted, band, is_warm, options, ignore)
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise DiffsegError(
                f"the loss is not finite at iteration {step} (pictures {', '.join(names)}); "
                "lower learning_rate, and look at these pictures and labels"
            )
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - step / count) ** 0.9
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if average:
            update_average(average, network, min(options.ema, (1 + step) / (10 + step)))
        for name, value in measures(losses, logits, label, trusted, ignore).items():
            history.setdefault(name, []).append(value)
        if step + 1 == min(count, -(-len(dataset) // batch)) and not any(history["valid"]):
            raise DiffsegError("no pixel of the training set has a label that counts; look at its label maps")
        bar.set_postfix(loss=f"{np.mean(history['loss'][-50:]):.3f}", refresh=False)
        is_due = (step + 1) % options.checkpoint_every == 0 or step + 1 == count
        if checkpoint and is_due and state.is_main_process:
            with atomic_path(checkpoint) as path:
                torch.save(
                    {
                        "recipe": recipe,
                        "step": step + 1,
                        "network": network.state_dict(),
                        "average": average,
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(),
                        "history": history,
                    },
                    path,
                )
    if average:
        network.load_state_dict(average)
    network.eval()
    return history


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


def read_checkpoint(path: Path, recipe: str, device: torch.device) -> dict:
    """Read a checkpoint of this very training; any other, or a damaged one, raises a DiffsegError."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        is_same = saved["recipe"] == recipe
    except Exception as error:  # truncated and foreign files come as many kinds of exception
        raise DiffsegError(f"{path} is no usable checkpoint ({error}); delete it to train from the start") from error
    if not is_same:
        raise DiffsegError(f"{path} belongs to a training with other options; delete it to train from the start")
    return saved
