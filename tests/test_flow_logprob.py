"""The flow-matching steps against diffusers' Euler step, torch.distributions, and a Gaussian whose flow is known.

For data N(M, TAU^2 I) the marginal at noise level s is N((1 - s) M, (1 - s)^2 TAU^2 + s^2), and the velocity
E[noise - x_0 | x] is linear in x.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from ddpo.ddim_logprob import gaussian_kl
from ddpo.errors import InputError
from ddpo.flow_logprob import KINDS, flow_log_prob, flow_step_mean_std, flow_step_with_logprob

M, TAU = 0.6, 0.3
SHAPES = [(3, 4, 8, 8), (3, 16, 16)]  # of latents, and of packed tokens


def make_scheduler(steps, shift=1.0, mu=None):
    """mu: the shift depends on the image's size, as FLUX has it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def draw(count, shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps, shift, mu", [(1, 3.0, None), (5, 1.0, None), (28, 3.0, None), (10, 1.0, 1.15)])
def test_without_noise_it_is_the_euler_step(kind, shape, steps, shift, mu):
    scheduler = make_scheduler(steps, shift, mu)
    for i, t in enumerate(scheduler.timesteps):
        sample, output = draw(2, shape, i)
        ours, log_prob = flow_step_with_logprob(scheduler, output, t, sample, 0.0, kind=kind)
        theirs = scheduler.step(output, t, sample).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not log_prob.any()


@pytest.mark.parametrize("steps, shift, mu", [(1, 1.0, None), (10, 3.0, None), (28, 7.0, None), (16, 1.0, 0.8)])
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_first_std_is_the_noise_level(steps, shift, mu, noise_level):
    scheduler = make_scheduler(steps, shift, mu)
    sample, output = draw(2, SHAPES[0])
    _, std = flow_step_mean_std(scheduler, output, scheduler.timesteps[0], sample, noise_level)
    torch.testing.assert_close(std, torch.full((3, 1, 1, 1), noise_level))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stds_are_those_of_the_papers(shift):
    """sde: a sqrt(s / (1 - s)) sqrt(-dt); dance: eta sqrt(-dt); cps: s' sin(a pi / 2), and none at the end."""
    scheduler = make_scheduler(10, shift)
    s, dt = scheduler.sigmas[1:-1].double(), scheduler.sigmas.double().diff()
    sample, output = draw(2, (10, 4, 8, 8))
    sde, dance, cps = (
        flow_step_mean_std(scheduler, output, scheduler.timesteps, sample, 0.7, kind)[1].flatten().double()
        for kind in ("sde", "dance", "cps")
    )
    torch.testing.assert_close(sde[1:], 0.7 * (s / (1 - s)).sqrt() * (-dt[1:]).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(dance, 0.7 * (-dt).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(cps, scheduler.sigmas[1:].double() * math.sin(0.35 * math.pi), rtol=1e-5, atol=0)
    assert cps[-1] == 0 < min(sde[-1], dance[-1])
    if shift == 3:  # SD3's scheduler shifts its smallest sigma twice
        assert sde[-1] == pytest.approx(0.0063, rel=0.02) and scheduler.sigmas[-2] == pytest.approx(0.0089, rel=0.01)


def velocity(x, s):
    """E[noise - x_0 | x_s = x] for data N(M, TAU^2)."""
    centred = (x - (1 - s) * M) / ((1 - s) ** 2 * TAU**2 + s**2)
    return s * centred - (M + (1 - s) * TAU**2 * centred)


def marginal(s):
    return (1 - s) * M, math.sqrt((1 - s) ** 2 * TAU**2 + s**2)


def schedule(steps, first=0.9):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(first, first / steps, steps).tolist())
    return scheduler


@pytest.mark.parametrize("kind, noise_level", [("sde", 0.7), ("sde", 0.3), ("dance", 0.5)])
def test_marginals_are_those_of_the_ode(kind, noise_level):
    """20,000 samples at several noise levels, within four standard errors of the closed form that the ODE has too, but
    sample by sample the SDE goes another way."""
    scheduler = schedule(200)
    mean, std = marginal(0.9)
    start = mean + std * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    x = y = start
    for step, t in enumerate(scheduler.timesteps):
        s = float(scheduler.sigmas[step])
        x, _ = flow_step_with_logprob(scheduler, velocity(x, s), t, x, noise_level, kind=kind)
        y, _ = flow_step_with_logprob(scheduler, velocity(y, s), t, y, 0.0, kind=kind)
        if (step + 1) % 50 == 0:
            mean, std = marginal(float(scheduler.sigmas[step + 1]))
            for drawn in (x, y):
                assert abs(float(drawn.mean()) - mean) < 4 * std / math.sqrt(drawn.numel())
                assert abs(float(drawn.std()) - std) < 4 * std / math.sqrt(2 * drawn.numel())
    correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    assert correlation < 0.9


@pytest.mark.parametrize("kind, noise_level", [("sde", 0.7), ("dance", 0.5)])
def test_marginals_converge_with_the_number_of_steps(kind, noise_level):
    """The step is affine in x, so mean and variance go through it exactly. At the end the mean is right, as it moves on
    a line, and what the std is off by falls as 1 / steps."""

    def errors(steps):
        scheduler = schedule(steps)
        mean, std = marginal(0.9)
        for step, t in enumerate(scheduler.timesteps):
            x = torch.tensor([[0.0], [1.0]])
            output = velocity(x, float(scheduler.sigmas[step]))
            at, noise = flow_step_mean_std(scheduler, output, t, x, noise_level, kind)
            slope = float(at[1] - at[0])
            mean, std = float(at[0]) + slope * mean, math.hypot(slope * std, float(noise[0]))
        return mean - M, std - TAU

    (mean, coarse), (_, fine) = errors(100), errors(400)
    assert abs(mean) < 1e-5 and abs(coarse) < 0.02 and coarse / fine == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_has_its_own_timestep(kind, shape):
    scheduler = make_scheduler(10, 3.0)
    sample, output, noise = draw(3, (10, *shape[1:]))
    options = {"noise_level": 0.7, "kind": kind}
    together, log_probs = flow_step_with_logprob(scheduler, output, scheduler.timesteps, sample, noise=noise, **options)
    for i, t in enumerate(scheduler.timesteps):
        one = slice(i, i + 1)
        alone, log_prob = flow_step_with_logprob(scheduler, output[one], t, sample[one], noise=noise[one], **options)
        assert torch.equal(together[one], alone) and torch.equal(log_probs[one], log_prob)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_a_step_gives_the_log_prob_drawn(kind, shape, dtype):
    """To the bit, in float32 whatever the network's precision; and it is the mean of torch's normals, or for cps what
    is left of it without the std and the normaliser."""
    scheduler = make_scheduler(10, 3.0)
    dims = tuple(range(1, len(shape)))
    for i, t in enumerate(scheduler.timesteps):
        sample, output = (x.to(dtype) for x in draw(2, shape, i))
        x, log_prob = flow_step_with_logprob(scheduler, output, t, sample, 0.7, kind=kind)
        assert x.dtype == log_prob.dtype == torch.float32
        _, again = flow_step_with_logprob(scheduler, output, t, sample, 0.7, prev_sample=x, kind=kind)
        assert torch.equal(again, log_prob)
        mean, std = flow_step_mean_std(scheduler, output, t, sample, 0.7, kind)
        if kind == "cps":
            unit = Normal(mean.double(), 0.5**0.5)  # 1 / (2 std^2) is 1
            expected = unit.log_prob(x.double()) - unit.log_prob(mean.double())
        else:
            expected = Normal(mean.double(), std.double()).log_prob(x.double())
        torch.testing.assert_close(log_prob.double(), expected.mean(dim=dims), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_gaussian(kind):
    """d log p / d v = (x - mean) / std^2 * d mean / d v, the last by a difference, as the mean is linear in v; for cps
    2 std^2 times that. The last step of cps, which has no noise, has none at the value that was drawn."""
    scheduler = make_scheduler(10, 3.0)
    for t in scheduler.timesteps[[0, 4, 9]]:
        sample, output = draw(2, (1, 4, 8, 8))
        output.requires_grad_()
        x, _ = flow_step_with_logprob(scheduler, output, t, sample, 0.7, kind=kind)
        _, log_prob = flow_step_with_logprob(scheduler, output, t, sample, 0.7, prev_sample=x, kind=kind)
        (gradient,) = torch.autograd.grad(log_prob.sum(), output)
        mean, std = flow_step_mean_std(scheduler, output, t, sample, 0.7, kind)
        slope = flow_step_mean_std(scheduler, output + 1, t, sample, 0.7, kind)[0] - mean
        expected = (x - mean) * (2 if kind == "cps" else 1 / std**2) * slope / output.numel()
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-3, atol=1e-5)
        assert not x.requires_grad and gradient.any() == (kind != "cps" or t != scheduler.timesteps[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_that_of_the_normals(kind):
    scheduler = make_scheduler(10, 3.0)
    sample, output, base = draw(3, (9, 4, 8, 8))
    mean, std = flow_step_mean_std(scheduler, output, scheduler.timesteps[:9], sample, 0.7, kind)
    base_mean, _ = flow_step_mean_std(scheduler, base, scheduler.timesteps[:9], sample, 0.7, kind)
    expected = kl_divergence(Normal(mean, std), Normal(base_mean, std)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, base_mean, std), expected)


def test_cps_keeps_the_coefficients():
    """Whatever the steps and the noise: a sample (1 - s) x_0 + s eps of known x_0 becomes one at s', with the same x_0
    and a noise of variance cos^2 + sin^2 = 1."""
    scheduler = make_scheduler(5, 3.0)
    x_0, eps, noise = draw(3, (4, 4, 32, 32))
    s, s_next = scheduler.sigmas[1], scheduler.sigmas[2]
    x, _ = flow_step_with_logprob(
        scheduler, eps - x_0, scheduler.timesteps[1], (1 - s) * x_0 + s * eps, 0.8, noise=noise, kind="cps"
    )
    now = (x - (1 - s_next) * x_0) / s_next
    torch.testing.assert_close(now, math.cos(0.4 * math.pi) * eps + math.sin(0.4 * math.pi) * noise, rtol=0, atol=1e-5)


def test_bad_inputs_name_what_is_wrong():
    scheduler, (x, v) = make_scheduler(10), draw(2, SHAPES[0])
    t = scheduler.timesteps[3]

    def step(noise_level=0.7, kind="sde", scheduler=scheduler, t=t, v=v, x=x, **given):
        return flow_step_with_logprob(scheduler, v, t, x, noise_level, kind=kind, **given)

    ddim = DDIMScheduler()
    ddim.set_timesteps(10)
    for call, message in (
        (lambda: step(kind="sed"), "unknown kind of flow step 'sed'. Did you mean sde"),
        (lambda: step(-0.1), "noise level -0.1 of a sde step must be at least 0"),
        (lambda: step(math.nan), "noise level nan"),
        (lambda: step(math.inf, "dance"), "noise level inf"),
        (lambda: step(1.1, "cps"), "noise level 1.1 of a cps step must be 0 to 1; its authors use 0.8"),
        (lambda: step(t=123), "timestep 123 is none of the scheduler's 10 timesteps"),
        (lambda: step(v=v[:1]), r"model_output \(1, 4, 8, 8\) and sample \(3, 4, 8, 8\) differ"),
        (lambda: step(noise=x[:, :1]), "noise .* and sample .* differ"),
        (lambda: step(prev_sample=x[0]), "prev_sample .* and sample .* differ"),
        (lambda: step(scheduler=FlowMatchEulerDiscreteScheduler()), "call its set_timesteps first"),
        (lambda: step(scheduler=ddim), "DDIMScheduler is not the scheduler of a flow"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert flow_log_prob(x, x, torch.zeros(3, 1, 1, 1)).tolist() == [0, 0, 0]
