"""The group norms of ddpo/group_norm.py, in Triton's interpreter; torch's own are the oracle, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from ddpo import group_norm

ROOT = Path(__file__).parent.parent


def norm_and_input(count, channels, height, width, groups, dtype, mean=1.0):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, channels, dtype=dtype)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(count, channels, height, width) + mean
    return norm, x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enabled", [True, False])
def test_elsewhere_they_are_torchs(dtype, enabled, monkeypatch):
    """To the bit, on a CPU or without Triton, large as it may be; and so are the gradients."""
    monkeypatch.setattr(group_norm, "enabled", enabled)
    monkeypatch.setattr(group_norm, "LEAST", 1)
    norm, x = norm_and_input(2, 8, 5, 3, 4, dtype)
    for ours, theirs in (
        (group_norm.norm_and_silu(norm, x), silu(norm(x))),
        (group_norm.norm_alone(norm, x), norm(x)),
    ):
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(y.sum(), (x, *norm.parameters())) for y in (ours, theirs)]
        assert all(map(torch.equal, *gradients))


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    "changed", [{}, {"dtype": torch.float32}, {"size": 8}, {"channels_last": False}, {"triton": None}], ids=str
)
def test_they_are_for_large_activations_in_half_precision_with_channels_last(changed, monkeypatch):
    monkeypatch.setattr(group_norm, "triton", changed.get("triton", "there"))
    monkeypatch.setattr(group_norm, "type", lambda x: torch.Tensor, raising=False)
    size = changed.get("size", 64)
    x = torch.empty(1, 320, size, size, dtype=changed.get("dtype", torch.bfloat16))
    if changed.get("channels_last", True):
        x = x.to(memory_format=torch.channels_last)
    assert group_norm.applies(x.as_subclass(OnGpu)) == (not changed)
    assert not group_norm.applies(x)


def test_kernels_in_tritons_interpreter():
    """Skipped without Triton, which torch for CPUs, and so CI, comes without. In a process of its own, since the
    interpreter is chosen as the kernels are defined."""
    pytest.importorskip("triton")
    command = [sys.executable, str(Path(__file__).resolve())]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def check(with_silu, *shape_and_dtype, **mean):
    """Output and gradients against float64's: as exact as numbers of that dtype are."""
    norm, x = norm_and_input(*shape_and_dtype, **mean)
    exact = torch.nn.GroupNorm(norm.num_groups, norm.num_channels, dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    dy = torch.randn_like(x)
    results = []
    for module, y in ((norm, group_norm.group_norm(norm, x, with_silu)), (exact, exact(x.double()))):
        y = silu(y) if module is exact and with_silu else y
        results.append([y, *torch.autograd.grad(y, (x, *module.parameters()), dy.to(y.dtype))])
    for ours, theirs in zip(*results, strict=True):
        error = float(((ours.double() - theirs).norm() / theirs.norm()).detach())
        assert error < max(torch.finfo(x.dtype).eps, 1e-6), (shape_and_dtype, mean, error)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    for silu_too in (True, False):
        check(silu_too, 2, 96, 5, 7, 8, torch.bfloat16)  # more channels than a tile, fewer pixels than a chunk
        check(silu_too, 1, 40, 17, 19, 4, torch.float16)  # more pixels than a chunk, whose last tile is not full
    check(True, 2, 12, 20, 13, 3, torch.float32, mean=0.0)
    check(False, 1, 8, 16, 17, 2, torch.bfloat16, mean=30.0)  # E x^2 - (E x)^2 would lose its digits
