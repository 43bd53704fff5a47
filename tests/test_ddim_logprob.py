"""The DDIM step against diffusers' own, and its log-prob against torch.distributions."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from ddpo.ddim_logprob import ddim_step_mean_std, ddim_step_with_logprob, gaussian_kl


def make_scheduler(steps, prediction_type="epsilon", **options):
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | options
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **options
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [7, 10, 50])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"set_alpha_to_one": True, "steps_offset": 0}, {"clip_sample": True}])
def test_step_equals_diffusers(prediction_type, steps, eta, options):
    scheduler = make_scheduler(steps, prediction_type, **options)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        sample, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        theirs = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        ours, _ = ddim_step_with_logprob(scheduler, output, t, sample, eta, noise=noise)
        # x_0 is divided by sqrt(alpha_t), 0.07 at the first step: rounding grows with it.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_sample_has_its_own_timestep():
    scheduler = make_scheduler(10)
    sample, output, noise = torch.randn(3, 10, 4, 8, 8)
    together, log_probs = ddim_step_with_logprob(scheduler, output, scheduler.timesteps, sample, 1.0, noise=noise)
    for i, t in enumerate(scheduler.timesteps):
        one = slice(i, i + 1)
        alone, log_prob = ddim_step_with_logprob(scheduler, output[one], t, sample[one], 1.0, noise=noise[one])
        assert torch.equal(together[one], alone) and torch.equal(log_probs[one], log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_prob_is_the_mean_of_the_normals(dtype):
    """Whatever precision the network's output has, the arithmetic is float32, and the recorded latent is the scored."""
    scheduler = make_scheduler(10)
    for t in scheduler.timesteps:
        sample, output = torch.randn(2, 3, 4, 8, 8).to(dtype)
        prev_sample, log_prob = ddim_step_with_logprob(scheduler, output, t, sample, 1.0)
        assert prev_sample.dtype == log_prob.dtype == torch.float32
        mean, std = ddim_step_mean_std(scheduler, output, t, sample, 1.0)
        expected = Normal(mean.double(), std.double()).log_prob(prev_sample.double()).mean(dim=(1, 2, 3))
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
        _, again = ddim_step_with_logprob(scheduler, output, t, sample, 1.0, prev_sample=prev_sample)
        assert torch.equal(again, log_prob)


def test_gradient_is_that_of_the_gaussian():
    """d log p / d model_output = (x - mu) / sigma^2 * d mu / d model_output, the last by a finite difference."""
    scheduler = make_scheduler(10)
    t = scheduler.timesteps[4]
    sample, output, prev_sample = torch.randn(3, 1, 4, 8, 8)
    output.requires_grad_()
    _, log_prob = ddim_step_with_logprob(scheduler, output, t, sample, 1.0, prev_sample=prev_sample)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    mean, std = ddim_step_mean_std(scheduler, output, t, sample, 1.0)
    mean_up, _ = ddim_step_mean_std(scheduler, output + 1, t, sample, 1.0)  # the mean is linear in the output
    expected = (prev_sample - mean) / std**2 * (mean_up - mean) / output.numel()
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta, options", [(0.0, {}), (1.0, {"set_alpha_to_one": True, "steps_offset": 0})])
def test_deterministic_step_is_scored_zero_without_gradient(eta, options):
    scheduler = make_scheduler(10, **options)
    t = scheduler.timesteps[-1]
    output = torch.randn(2, 4, 8, 8, requires_grad=True)
    _, log_prob = ddim_step_with_logprob(scheduler, output, t, torch.randn(2, 4, 8, 8), eta)
    assert torch.equal(log_prob, torch.zeros(2))
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_final_alpha_is_honoured():
    """The last step goes to final_alpha_cumprod, not to timestep 0 of the schedule (where a peer clamps it)."""
    scheduler = make_scheduler(10)
    scheduler.final_alpha_cumprod = torch.tensor(0.9999)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    t = scheduler.timesteps[-1]
    theirs = scheduler.step(output, t, sample, eta=0.0).prev_sample
    torch.testing.assert_close(ddim_step_with_logprob(scheduler, output, t, sample, 0.0)[0], theirs)


def test_dynamic_thresholding_is_refused():
    scheduler = make_scheduler(10, thresholding=True)
    with pytest.raises(NotImplementedError, match="thresholding"):
        ddim_step_mean_std(scheduler, torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, 8, 8), 1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_kl_is_that_of_the_normals(prediction_type):
    scheduler = make_scheduler(10, prediction_type)
    sample, output, base = torch.randn(3, 10, 4, 8, 8)
    mean, std = ddim_step_mean_std(scheduler, output, scheduler.timesteps, sample, 0.7)
    base_mean, _ = ddim_step_mean_std(scheduler, base, scheduler.timesteps, sample, 0.7)
    expected = kl_divergence(Normal(mean, std), Normal(base_mean, std)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, base_mean, std), expected)
    assert not gaussian_kl(mean, base_mean, torch.zeros_like(std)).any()  # deterministic: no density
