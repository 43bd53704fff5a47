"""The algorithms against the policy gradient written out."""

from types import SimpleNamespace

import torch

from ddpo.losses import ddpo_is

CONFIG = SimpleNamespace(clip_range=1e-2)


def gaussian_log_prob(theta, x):
    return (-((x - theta) ** 2) / 2).mean(dim=1)


def test_gradient_before_any_update_is_the_policy_gradient():
    """At the old policy the ratio is 1 and grad loss = -E[A grad log p], which for unit Gaussians is -A (x - theta)."""
    theta = torch.randn(8, requires_grad=True)
    x, advantage = torch.randn(5, 8), torch.randn(5)
    log_prob = gaussian_log_prob(theta, x)
    loss, info = ddpo_is(log_prob, log_prob.detach(), advantage, CONFIG)
    (gradient,) = torch.autograd.grad(loss.mean(), theta)
    expected = -(advantage[:, None] * (x - theta) / 8).mean(dim=0)
    torch.testing.assert_close(gradient, expected.detach())
    assert torch.equal(loss.detach(), -advantage)
    assert not info["clip_fraction"].any() and not info["approx_kl"].any()


def test_clipping_stops_the_gradient_only_where_it_would_overshoot():
    shift = torch.tensor([0.02, 0.02, -0.02, -0.02, 0.005, -0.005], requires_grad=True)  # log ratio
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    loss, info = ddpo_is(shift, torch.zeros(6), advantage, CONFIG)
    (gradient,) = torch.autograd.grad(loss.sum(), shift)
    # Further up with a positive advantage, or down with a negative one, beyond the range: no gradient.
    assert (gradient != 0).tolist() == [False, True, True, False, True, True]
    assert info["clip_fraction"].tolist() == [1, 1, 1, 1, 0, 0]
    moving = gradient != 0
    torch.testing.assert_close(gradient[moving], (-advantage * shift.exp())[moving].detach())
