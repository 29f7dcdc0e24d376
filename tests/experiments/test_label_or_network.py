"""Whether labels or networks are right, by the margin: hand-made pictures whose truth is known."""

import torch

from diffseg.experiments.label_or_network import TENTHS, accuracies, reliability_figure, tenths


def scores(label: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(label, 2).permute(2, 0, 1)[None].float()


def test_tenths_order_each_class_by_its_margin():
    label = torch.tensor([[0] * 20, [1] * 20])
    margin = torch.stack([torch.arange(20), torch.arange(20).flip(0) + 100]).byte()
    expected = torch.arange(TENTHS).repeat_interleave(2)
    assert torch.equal(tenths(label, margin), torch.stack([expected.flip(0), expected]))


def test_accuracies_by_tenth_of_the_margin():
    truth = torch.zeros(2, 20, dtype=torch.int64)
    truth[1] = 1
    label = truth.clone()
    label[1, :2] = 0  # an object's pixels that the label misses
    margin = torch.full((2, 20), 200, dtype=torch.uint8)
    margin[1, :2] = 1  # and it is not sure of them
    pictures = [("one", torch.zeros(3, 2, 20, dtype=torch.uint8), label, margin)]
    always = {"right": lambda image: scores(truth), "background": lambda image: scores(torch.zeros_like(truth))}
    rows, objects = accuracies(pictures, lambda image: scores(truth), always).values()
    assert sum(row["pixels"] for row in rows) == 40 and all(row["right"] == 1 for row in rows)
    assert rows[0]["label"] == 1 and rows[-1]["label"] == 0.5  # two of the four pixels of the last tenth
    assert sum(row["pixels"] for row in objects) == 18
    assert all(row["label"] == 1 and row["background"] == 0 for row in objects if row["pixels"])
    table = [
        {"region": "all pixels", "tenth": row["tenth"], "opinion": name, "accuracy": row[name]}
        for row in rows
        for name in ("label", "right")
    ]
    assert len(reliability_figure(table).axes[0].lines) == 2
