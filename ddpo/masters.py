"""Half precision without autocast: the network's weights are half precision, their masters float32.

The optimizer, the moving average and checkpoints see the masters alone. `copy_to_network` rounds them into the network
before a forward pass, or once before many (`unchanged`), and each gradient is added to its master's as soon as the
backward pass has it, so that sums over minibatches are float32. Under autocast, every norm, cast and residual would
process its activations in float32.
"""

import contextlib
from functools import partial

import torch


class Masters:
    """The float32 masters of a network's trained weights; of a float32 network, these weights themselves."""

    def __init__(self, network, dtype):
        """Casts the network to dtype, unless that is None."""
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self.parameters, self._unchanged = self.weights, False
        if dtype is not None:
            self.parameters = [torch.nn.Parameter(p.detach()) for p in self.weights]
            for p in network.parameters():
                if p.dtype != dtype:
                    p.data = p.data.to(dtype)
            for weight, master in zip(self.weights, self.parameters):
                weight.register_post_accumulate_grad_hook(partial(_add_gradient, master))

    @torch.no_grad()
    def copy_to_network(self):
        """Rounds the masters into the network. By `.data`, since they may not have changed since a forward pass that
        autograd has yet to go back through."""
        if self.parameters is not self.weights and not self._unchanged:
            torch._foreach_copy_([p.data for p in self.weights], self.parameters)

    @contextlib.contextmanager
    def unchanged(self):
        """Within it, nothing changes the masters, so they are rounded here and not before each forward pass: 5 GB of
        traffic for Stable Diffusion's. A scope, since the masters cannot tell: the fused optimizer and the moving
        average write them without raising their version counters."""
        self.copy_to_network()
        before, self._unchanged = self._unchanged, True
        try:
            yield
        finally:
            self._unchanged = before

    @contextlib.contextmanager
    def in_network(self):
        """Within it, the network holds the masters themselves, to be saved or loaded."""
        if self.parameters is self.weights:
            yield
            return
        halves = [p.data for p in self.weights]
        for weight, master in zip(self.weights, self.parameters):
            weight.data = master.data
        try:
            yield
        finally:
            for weight, half in zip(self.weights, halves):
                weight.data = half


def _add_gradient(master, weight):
    """Adds a weight's gradient to its master's, in float32."""
    master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
    weight.grad = None
