"""Whether labels or networks are right, by the margin: hand-made images whose truth is known."""

import torch

from diffseg.experiments import label_or_network
from diffseg.experiments.label_or_network import (
    AGREED,
    ALONE,
    EDGES,
    LABEL,
    NETWORK,
    OPINIONS,
    PAIR,
    TENTHS,
    accuracies,
    reliability_figure,
    tenths,
)
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
    images = [("one", torch.zeros(3, 2, 20, dtype=torch.uint8), label, reliability)]
    other = truth.clone()
    other[1, 0] = 0  # the second network is right in one of the two
    networks = [lambda image: 9 * scores(truth), lambda image: scores(other)]
    rows = accuracies(images, lambda image: scores(truth), networks)
    assert sum(row["pixels"] for row in rows) == 40
    assert all(row[NETWORK] == row[PAIR] == 1 for row in rows)  # the first network is surer than the second
    assert rows[0][LABEL] == 1 and rows[-1][LABEL] == 0.3333  # two of the last tenth's three are wrong
    assert rows[-1][AGREED] == 0.5  # in two of these three the networks agree, in one of the two against the label
    table = [
        {"run": "r", "tenth": row["tenth"], "opinion": name, "accuracy": row[name]} for row in rows for name in OPINIONS
    ]
    assert len(reliability_figure(table).axes[0].lines) == len(OPINIONS)


def test_ignored_pixels_are_not_judged_and_the_answer_along_edges_is_its_own(monkeypatch):
    truth = torch.zeros(2, 20, dtype=torch.int64)
    truth[1] = 1
    label = truth.clone()
    label[0, :5] = 255
    images = [("one", torch.zeros(3, 2, 20, dtype=torch.uint8), label, torch.zeros(2, 2, 20, dtype=torch.uint8))]
    given = []

    def always_wrong(pair, batch, labels, reliable):
        given.append((labels, reliable))
        return scores(1 - truth)

    monkeypatch.setattr(label_or_network, "edge_aware", always_wrong)
    monkeypatch.setattr(label_or_network, "edges_alone", lambda *_: truth)
    first = accuracies(images, lambda image: scores(truth), [lambda image: scores(truth)] * 2)[0]
    assert first["pixels"] == 35 and first[LABEL] == first[PAIR] == first[AGREED] == 1
    assert first[EDGES] == 0 and first[ALONE] == 1
    [(labels, reliable)] = given
    assert torch.equal(labels[0], label) and not reliable[0][label == 255].any()
