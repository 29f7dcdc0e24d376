"""Workers are real processes: each call sees its own process and one thread."""

import os
from functools import partial

import pytest
import torch

from diffseg.workers import side_by_side, threads


@pytest.mark.slow  # a worker imports torch
def test_calls_side_by_side():
    calls = [partial(os.getpid), partial(torch.get_num_threads), partial(pow, 2, 3)]
    process, count, power = side_by_side(calls)
    assert process != os.getpid() and count == 1 and power == 8
    with pytest.raises(ZeroDivisionError):
        list(side_by_side([partial(divmod, 1, 0), partial(pow, 2, 3)]))


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    with threads(0):
        assert torch.get_num_threads() == before
