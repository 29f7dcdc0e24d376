"""Are the target images learned, or memorised? And when to stop: a rule that reads no label.

Some target images are held out. A generator that has learned the domain draws images that lie as near to these as to
the tuned ones. The images of a generator that copies lie nearer to the tuned ones. The number of neighbours among the
tuned images is thus a three-sample test for copying, as that of Meehan, Chaudhuri & Dasgupta (2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffseg.errors import DiffsegError
from diffseg.target_domain import kernel_distance

LEVEL = 0.95  # of the test for copies, and its number of random splits; our choice
SPLITS = 1000


@dataclass(frozen=True)
class Memorisation:
    """How images drawn after `steps` steps lie to tuned and held-out images (of features, Euclidean).

    to_tuned, held_out_to_tuned: median distance to the nearest tuned image, of the drawn ones and of the held-out
    real ones. Below the latter may mean copies, or only that drawn images are smoother than real ones; so there is a
    second condition, `tuned_share`: the share of drawn images whose nearest real image is a tuned one. Without copying
    nothing distinguishes tuned from held-out ones, so it would be the same for any split of the real images by
    lot: `expected_share` = tuned / (tuned + held out) on average, above `limit` for one split in twenty (a
    permutation test; a real image that is near to many drawn ones widens it). distance: kernel distance of the drawn
    to the held-out images.
    """

    steps: int
    distance: float
    to_tuned: float
    held_out_to_tuned: float
    tuned_share: float
    expected_share: float
    limit: float

    @property
    def copies(self) -> bool:
        """Whether more drawn images lie next to tuned ones than chance explains, and nearer than held-out ones do.

        The first alone holds for one candidate in twenty, however far from all real images it is.
        """
        is_more = self.tuned_share > self.limit + 1e-6  # sums in another order differ by rounding
        return is_more and self.to_tuned < self.held_out_to_tuned


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the distance of each row of a (N x D) to each row of b (M x D), float64 N x M."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def nearest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the distance of each row of a (N x D) to its nearest row of b (M x D), float64 N."""
    return distances(a, b).amin(dim=1)


def measure_memorisation(steps: int, drawn: torch.Tensor, tuned: torch.Tensor, held_out: torch.Tensor) -> Memorisation:
    """Compare features (images x D each) of drawn, tuned and held-out images.

    Raises a DiffsegError for less than two drawn or held-out images, or none that was tuned on.
    """
    if min(len(drawn), len(held_out)) < 2 or not len(tuned):
        raise DiffsegError(
            f"{len(drawn)} drawn, {len(tuned)} tuned and {len(held_out)} held-out images are too few to tell copies; "
            "raise lora_pictures or lora_held_out, or set lora_candidates to 1."
        )
    real = torch.cat([tuned, held_out])
    neighbours = distances(drawn, real).argmin(dim=1).bincount(minlength=len(real)) / len(drawn)
    lots = torch.Generator().manual_seed(0)
    splits = [neighbours[torch.randperm(len(real), generator=lots)[: len(tuned)]].sum() for _ in range(SPLITS)]
    return Memorisation(
        steps=steps,
        distance=kernel_distance(drawn, held_out),
        to_tuned=nearest(drawn, tuned).median().item(),
        held_out_to_tuned=nearest(held_out, tuned).median().item(),
        tuned_share=neighbours[: len(tuned)].sum().item(),
        expected_share=len(tuned) / len(real),
        limit=torch.stack(splits).quantile(LEVEL).item(),
    )


def choose_steps(rows: Sequence[Memorisation]) -> int:
    """Return the number of steps whose images are nearest to the held-out ones, of those before copying begins.

    The rule (our choice) reads images only, never a label. When the first candidate copies already, that is it.
    """
    rows = sorted(rows, key=lambda row: row.steps)
    copying = next((k for k, row in enumerate(rows) if row.copies), len(rows))
    return min(rows[: max(1, copying)], key=lambda row: row.distance).steps
