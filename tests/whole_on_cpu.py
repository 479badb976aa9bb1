"""A Placement for tests of either architecture."""

from contextlib import contextmanager

import torch


class WholeOnCpu:
    """The simplest Placement; it notices parameters that are assigned twice."""

    def __init__(self):
        self.assigned = []

    @contextmanager
    def empty(self):
        yield

    def assign(self, param, tensor):
        assert param.shape == tensor.shape
        assert not any(param is other for other in self.assigned)
        self.assigned.append(param)
        with torch.no_grad():
            param.copy_(tensor)
