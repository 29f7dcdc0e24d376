"""Whether labels or networks are right, by the margin: hand-made pictures whose truth is known."""

import torch

from diffseg.experiments.label_or_network import TENTHS, accuracies, reliability_figure, tenths
from diffseg.reliability import rank_within_class


def scores(label: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(label, 2).permute(2, 0, 1)[None].float()


def test_tenths_order_each_class_by_its_margin():
    label = torch.tensor([[0] * 256, [1] * 256])
    margin = torch.stack([torch.arange(256), torch.arange(256).flip(0)]).byte()
    found = tenths(rank_within_class(label, margin))
    assert torch.equal(found[1], torch.arange(256) * TENTHS // 256) and torch.equal(found[0], found[1].flip(0))


def test_accuracies_by_tenth_of_the_margin():
    truth = torch.zeros(2, 20, dtype=torch.int64)
    truth[1] = 1
    label = truth.clone()
    label[1, :2] = 0  # an object's pixels that the label misses
    margin = torch.full((2, 20), 200, dtype=torch.uint8)
    margin[1, :2] = 1  # and it is not sure of them
    reliability = torch.stack([margin, rank_within_class(label, margin)])
    pictures = [("one", torch.zeros(3, 2, 20, dtype=torch.uint8), label, reliability)]
    always = {"right": lambda image: scores(truth), "background": lambda image: scores(torch.zeros_like(truth))}
    rows, objects = accuracies(pictures, lambda image: scores(truth), always).values()
    assert sum(row["pixels"] for row in rows) == 40 and all(row["right"] == 1 for row in rows)
    assert rows[0]["label"] == 1 and rows[-1]["label"] == 0.3333  # two of the last tenth's three are wrong
    assert sum(row["pixels"] for row in objects) == 18
    assert all(row["label"] == 1 and row["background"] == 0 for row in objects if row["pixels"])
    table = [
        {"region": "all pixels", "tenth": row["tenth"], "opinion": name, "accuracy": row[name]}
        for row in rows
        for name in ("label", "right")
    ]
    assert len(reliability_figure(table).axes[0].lines) == 2
