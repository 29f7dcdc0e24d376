"""The images of a training, in its order and changed by chance: scale, crop, flip, colour and blur, a seed each."""

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from diffseg.reliability import TAUGHT, margin_thresholds, trusted_pixels
from diffseg.seeds import derive_seed
from diffseg.training_options import TrainingOptions


class Scale(v2.ScaleJitter):
    """ScaleJitter whose masks stay on their image: torchvision's nearest neighbour puts them half a pixel off."""

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        return tv_tensors.Mask(v2.functional.resize_image(inpt, params["size"], v2.InterpolationMode.NEAREST_EXACT))


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
                Scale((options.crop, options.crop), options.scale_jitter, antialias=True),
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
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.default_generator.manual_seed(derive_seed(self.seed, "augmentation", k))
            image, masks = self.transform(tv_tensors.Image(image), tv_tensors.Mask(masks))
        label, trusted = masks.as_subclass(torch.Tensor)
        return name, image.as_subclass(torch.Tensor), label, (trusted == 1) & (label != self.ignore)


def shown_side(size: tuple[int, int], options: TrainingOptions) -> int:
    """Return the shorter side, in pixels, at which a training shows images of `size` (height, width).

    Whatever the size on disk, an image is scaled until it fits into the crop, and then by a factor of `scale_jitter`
    (`Augmented`); of these factors it is the middle one on a logarithmic scale.
    """
    smallest, largest = options.scale_jitter
    return max(1, round(options.crop * min(size) / max(size) * (smallest * largest) ** 0.5))
