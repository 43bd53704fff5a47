"""The optimizer with two parameter groups, as someone would change it: both are warmed up, clipped and resumed."""

import torch
from accelerate import Accelerator

from config.base import get_config
from ddpo import optimizer


def two_groups(parameters, options):
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 10 * options.learning_rate}]
    return torch.optim.SGD(groups, lr=options.learning_rate)


def make(monkeypatch, **options):
    monkeypatch.setattr(optimizer, "make_optimizer", two_groups)
    config = get_config()
    config.train.update(options)
    weights = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    return weights, optimizer.Optimizer(weights, config, Accelerator(cpu=True))


def test_every_group_is_warmed_up_and_the_norm_is_global(monkeypatch):
    """With a gradient of 2 everywhere, clipped to norm 1, a weight moves by its rate x share of the warm-up / 5^.5."""
    (a, b), adam = make(monkeypatch, learning_rate=0.1, warmup_updates=4, max_grad_norm=1.0)
    for done, share in ((0, 0.25), (1, 0.5), (7, 1.0)):
        before = a.detach().clone(), b.detach().clone()
        adam.backward(2 * (a.sum() + b.sum()))
        assert adam.clip()
        adam.step(done)
        for weight, old, rate in ((a, before[0], 0.1), (b, before[1], 1.0)):
            torch.testing.assert_close(old - weight.detach(), torch.full_like(old, rate * share / 5**0.5))
    summary = adam.summary()
    assert summary["updates"] == 3 and abs(summary["grad_norm"] - 2 * 5**0.5) < 1e-5
    assert adam.summary()["updates"] == 0


def test_a_resumed_optimizer_keeps_the_options_of_every_group(monkeypatch):
    _, saved = make(monkeypatch, learning_rate=0.1)
    _, resumed = make(monkeypatch, learning_rate=0.2)
    resumed.load_state_dict(saved.state_dict())
    assert [group["peak_lr"] for group in resumed.adam.param_groups] == [0.2, 2.0]


def test_a_discarded_gradient_is_gone(monkeypatch):
    (a, b), adam = make(monkeypatch)
    adam.backward(a.sum() + b.sum())
    adam.discard()
    assert a.grad is None and adam.loss == 0
