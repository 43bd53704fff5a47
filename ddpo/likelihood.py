"""How likely the samples of an epoch are under the weights being trained: the terms that losses are made of.

On the reverse process, log p_theta(x_{t-1} | x_t, c) of the denoising steps that were taken is exact. On the forward
process, log p_theta(x_0 | c) of what came out has only a bound, minus the denoising error: what base models are trained
by. It needs only the finished image, from any sampler, and few passes through the network. The images
of a one-step generator have no likelihood, but they are functions of their noise that gradients go through.
"""

from typing import NamedTuple

import torch

from ddpo.ddim_logprob import gaussian_kl
from ddpo.drift import load_drift_features
from ddpo.pipeline_logprob import predict_noise
from ddpo.seeds import torch_generator


class Transitions(NamedTuple):
    """B denoising steps that were taken; each value is (B,) float32, a mean over the latent's dimensions."""

    log_prob: torch.Tensor  # log p_theta(x_{t-1} | x_t, c)
    old_log_prob: torch.Tensor  # the same under the weights that sampled; no gradient
    kl_old: torch.Tensor  # KL(p_theta || p_old) of the step: the exact divergence from the policy that sampled it
    sample: torch.Tensor | None = None  # which of the process's samples each step belongs to
    kl_base: torch.Tensor | None = None  # KL(p_theta || p_base), if `train.kl_weight` asks for it

    def ratio_error(self):
        """|ratio - 1| (B,), which is 0 before any update."""
        return torch.expm1(self.log_prob.detach() - self.old_log_prob).abs()


class Draws(NamedTuple):
    """B samples x_0, each noised to an x_t at a random timestep (`noised`). All but x_0_scale are (B, C, H, W) float32,
    in the space of the network's output: noise, v or x_0, by `prediction_type`, or a flow's velocity."""

    output: torch.Tensor  # network(x_t, t, c) under the weights being trained
    target: torch.Tensor  # what it is to predict, of this x_0 and this noise
    old: torch.Tensor | None = None  # the output under the weights that sampled, for algorithms that need it
    base: torch.Tensor | None = None  # that of the base model, if the algorithm or `train.kl_weight` needs it
    x_0_scale: torch.Tensor | None = None  # (B, 1, 1, 1): |d x_0 / d output| at this x_t

    @property
    def error(self):
        """(B,): the denoising error. Its negative bounds log p_theta(x_0 | c) from below, up to a constant and to
        weights of the timesteps (DDPM, arXiv 2006.11239, section 3.4)."""
        return mean_square(self.output - self.target)

    @property
    def kl_base(self):
        """(B,): the divergence from the base model that a step from x_t would have, up to a weight of the timestep."""
        return mean_square(self.output - self.base)

    def ratio_error(self):
        """0: no step was taken and recorded that training would have to reproduce."""
        return torch.zeros_like(self.error)


class Generated(NamedTuple):
    """B images as a one-step generator draws them, by the weights being trained, from the noise that it was sampled
    with: in groups, one after the other, of all images of a prompt."""

    x_0: torch.Tensor  # (B, C, H, W) float32
    features: list  # of it, by layer of a frozen network: (B, D) float32 each
    group: int  # size of a group
    base: torch.Tensor  # what the base model draws from the same noise; no gradient
    base_features: list  # of that

    @property
    def kl_base(self):
        """(B,): the squared distance from the base model's image."""
        return mean_square(self.x_0 - self.base)

    def ratio_error(self):
        """0, as of `Draws`."""
        return torch.zeros(len(self.x_0), device=self.x_0.device)


def mean_square(x):
    """(B, ...) -> (B,)."""
    return (x**2).mean(dim=tuple(range(1, x.ndim)))


class Rollout:
    """What this process sampled in an epoch, and how the weights being trained score it."""

    def __init__(self, policy, config, algorithm, epoch, indices, prompts, trajectories):
        """algorithm: of ddpo/losses.py. indices: of this process's N samples in the epoch. trajectories: theirs."""
        self.policy, self.config, self.algorithm = policy, config, algorithm
        self.epoch, self.indices, self.prompts = epoch, indices, prompts
        self.latents, self.timesteps = trajectories.latents, trajectories.timesteps
        self.old_means, self.old_log_probs = trajectories.means, trajectories.log_probs  # (N, T, C, H, W), (N, T)
        self.prompt_embeds, self.negative_embeds = policy.embed(prompts), policy.embed([""])
        self.guidance_scale = config.sample.guidance_scale if config.train.guidance else 1.0
        # sigma_weighting: log-ratio * sigma_t / its mean; without, steps with little noise are clipped first.
        self.noise_level = policy.noise_level(config.sample)
        stds = policy.step_stds(self.noise_level)
        self.log_prob_scale = stds / stds.mean() if config.train.sigma_weighting else torch.ones_like(stds)
        self.old_outputs = None  # forward process: (N, draws, C, H, W), if `rescore` is asked for them
        if algorithm.process == "forward":
            group = config.sample.images_per_prompt if algorithm.pairs else 1  # whose draws are the same
            keys = [(config.seed, epoch, i - i % group) for i in indices]
            self.draws = draw_timesteps_and_noise(policy, keys, self.latents.shape[2:], config.train)
        if algorithm.process == "one step":
            self.features = load_drift_features(config.train.drift_model or config.model, policy.device, policy.dtype)

    def score(self, sample, step):
        """The Transitions, Draws or Generated of B pairs: `sample` (B,) indexes this rollout's samples, `step` (B,) the
        T steps (or the draws of a sample, inner epoch by inner epoch)."""
        if self.algorithm.process == "forward":
            return self._draws(sample, step)
        if self.algorithm.process == "one step":
            return self._generated(sample, step)
        mean, std = self._mean_std(sample, step)
        kl_old, kl_base = gaussian_kl(mean, self.old_means[sample, step], std), None
        if self.config.train.kl_weight:
            with torch.no_grad(), self.policy.base():
                base_mean, _ = self._mean_std(sample, step)
            kl_base = gaussian_kl(mean, base_mean, std)
        log_prob, old_log_prob = self._log_prob(sample, step, mean, std), self.old_log_probs[sample, step]
        scale = self.log_prob_scale[step]
        return Transitions(log_prob * scale, old_log_prob * scale, kl_old, sample, kl_base)

    def _mean_std(self, sample, step):
        """Mean (B, C, H, W) and std (B, 1, 1, 1) of the policy's steps from x_t, under its weights as they are."""
        x_t, t = self.latents[sample, step], self.timesteps[step]
        output = predict_noise(
            self.policy, x_t, t, self.prompt_embeds[sample], self.negative_embeds, self.guidance_scale
        )
        return self.policy.step_mean_std(output, t, x_t, self.noise_level)

    def _log_prob(self, sample, step, mean, std):
        """Of the x_{t-1} that were sampled; (B,)."""
        return self.policy.step_log_prob(self.latents[sample, step + 1], mean, std)

    def _draws(self, sample, step):
        given, target, x_0_scale = self._noised(sample, step)
        output, old, base = self.policy.forward(*given), None, None
        if "old" in self.algorithm.needs:  # before any update it is the output itself
            old = output.detach() if self.old_outputs is None else self.old_outputs[sample, step]
        if "base" in self.algorithm.needs or self.config.train.kl_weight:
            with torch.no_grad(), self.policy.base():
                base = self.policy.forward(*given)
        return Draws(output, target, old, base, x_0_scale)

    def _generated(self, sample, step):
        x_0, _ = self._mean_std(sample, step)
        with torch.no_grad(), self.policy.base():
            base, _ = self._mean_std(sample, step)
            base_features = self.features(base)
        return Generated(x_0, self.features(x_0), self.config.sample.images_per_prompt, base, base_features)

    def _noised(self, sample, step):
        """What the network is given of B draws, (x_t, t, Conditions); its target; and x_0_scale, as in `Draws`."""
        t, dropped, noise = (values[sample, step] for values in self.draws)
        x_t, target, x_0_scale = noised(self.policy.scheduler, self.latents[sample, -1], noise, t)
        return (x_t, t, self.prompt_embeds[sample].replace(dropped, self.negative_embeds)), target, x_0_scale

    @torch.no_grad()
    def rescore(self, plan):
        """Computes the old means and log-probs again, in the batches of training; on the forward process, the old
        outputs. plan: of `plan_updates`. The last pass comes first, so that a transition that several passes see has
        the value that the first will find."""
        forward = self.algorithm.process == "forward"
        if forward:
            self.old_outputs = torch.empty_like(self.draws[-1])
        with self.policy.masters.unchanged():
            for sample, step in (minibatch for minibatches in reversed(plan) for minibatch in minibatches):
                if forward:
                    self.old_outputs[sample, step] = self.policy.forward(*self._noised(sample, step)[0])
                else:
                    mean, std = self._mean_std(sample, step)
                    self.old_means[sample, step] = mean
                    self.old_log_probs[sample, step] = self._log_prob(sample, step, mean, std)

    def describe(self, sample, step):
        """Names a transition, or draw, in an error message: the first of B."""
        timestep = f"timestep {int(self.timesteps[step[0]])} of " if self.algorithm.process == "reverse" else ""
        return timestep + repr(self.prompts[sample[0]])


def batches_differ(config, share):
    """Whether training composes its batches otherwise than sampling, `share` being the samples of an update on this
    process. A batch composed otherwise may round otherwise, which would look like a changed policy."""
    return config.sample.batch_size != config.train.batch_size or share % config.train.batch_size > 0


def must_rescore(config, algorithm, share):
    """Whether what the weights that sampled say of each transition, or draw, must be computed before the updates. On
    the reverse process sampling has done so, but the ratio is exactly 1 before any update only if training composes
    its batches alike, and guides if sampling does. On the forward process a single update needs no pass of its own."""
    if algorithm.process != "reverse":
        updates = config.train.updates_per_epoch * config.train.inner_epochs
        return "old" in algorithm.needs and (config.sample.averaged or updates > 1)
    unguided = config.sample.guidance_scale > 1 and not config.train.guidance
    return batches_differ(config, share) or unguided


def latents_kept(config, process):
    """How many latents are kept of a sample: the steps and their means, or x_0 with the noise and old outputs of its
    draws."""
    if process != "forward":
        return 2 * config.sample.num_steps + 1
    return 1 + 2 * config.train.draws * config.train.inner_epochs


def draw_timesteps_and_noise(policy, keys, shape, options):
    """What N samples are noised with, `options.draws` times in each inner epoch: K draws in all.

    Timesteps are uniform over those of training, or with timestep_choice "first" over the noisiest
    `timestep_fraction` of them, and stratified: draw k of K' comes from the k-th of K' equal parts.

    Args:
        keys: N tuples of integers, each of which alone determines its sample's draws.
        shape: (C, H, W) of a latent.
        options: `config.train`; a share `prompt_dropout` of the draws is to get the empty prompt, as base models were
            trained, which keeps guidance working.
    Returns:
        timesteps (N, K) as the network takes them, dropped (N, K) booleans, noise (N, K, C, H, W), on its device.
    """
    count, trained = options.draws, policy.scheduler.config.num_train_timesteps
    lowest = 1 - options.timestep_fraction if options.timestep_choice == "first" else 0.0
    rows = []
    for key in keys:
        generator = torch_generator("denoising", *key)
        draws = []
        for k in range(count * options.inner_epochs):
            uniform, dropout = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            level = lowest + (1 - lowest) * (k % count + uniform) / count
            draws.append((int(trained * level), dropout < options.prompt_dropout))
        t, dropped = zip(*draws)
        noise = torch.randn(len(draws), *shape, generator=generator)
        rows.append((torch.tensor(t), torch.tensor(dropped), noise))
    t, dropped, noise = (torch.stack(values).to(policy.device) for values in zip(*rows))
    return policy.family.training_timesteps(t), dropped, noise


def noised(scheduler, x_0, noise, t):
    """x_0 (B, C, H, W) noised to timesteps t (B,): x_t, the network's target by `prediction_type` (noise, v or x_0),
    and x_0_scale (B, 1, 1, 1) = |d x_0 / d output|: sqrt((1 - alpha) / alpha) for noise, sqrt(1 - alpha) for v.
    Of a flow, x_t = (1 - s) x_0 + s noise, the target is noise - x_0, and x_0_scale is s."""
    if not hasattr(scheduler, "alphas_cumprod"):
        s = (t / scheduler.config.num_train_timesteps).reshape(-1, *[1] * (x_0.ndim - 1))
        return (1 - s) * x_0 + s * noise, noise - x_0, s
    alpha = scheduler.alphas_cumprod[t].reshape(-1, *[1] * (x_0.ndim - 1))
    target, x_0_scale = {
        "epsilon": (noise, ((1 - alpha) / alpha).sqrt()),
        "v_prediction": (alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0, (1 - alpha).sqrt()),
        "sample": (x_0, torch.ones_like(alpha)),
    }[scheduler.config.prediction_type]
    return alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise, target, x_0_scale
