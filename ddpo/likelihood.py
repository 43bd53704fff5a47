"""How likely the samples of an epoch are under the weights being trained: the terms that losses are made of.

On the reverse process, log p_theta(x_{t-1} | x_t, c) of the denoising steps that were taken is exact. On the forward
process, log p_theta(x_0 | c) of what came out has only a bound, minus the denoising error.
"""

from typing import NamedTuple

import torch

from ddpo.ddim_logprob import gaussian_kl, gaussian_log_prob
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
    """B samples x_0, each noised once at a random timestep; values are (B,) float32, means over dimensions."""

    error: torch.Tensor  # (prediction - target)^2

    def ratio_error(self):
        """0: nothing is compared with the weights that sampled."""
        return torch.zeros_like(self.error)


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
        # sigma_weighting: log-ratio * sigma_t / its mean, since steps with little noise would else be clipped first.
        stds = policy.step_stds(config.sample.eta)
        self.log_prob_scale = stds / stds.mean() if config.train.sigma_weighting else torch.ones_like(stds)

    def score(self, sample, step, inner_epoch):
        """The Transitions, or Draws, of B pairs: `sample` (B,) indexes this rollout's samples, `step` (B,) the T steps
        (or the draws of a sample)."""
        if self.algorithm.process == "forward":
            return self._draws(sample, inner_epoch)
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
        return self.policy.step_mean_std(output, t, x_t, self.config.sample.eta)

    def _log_prob(self, sample, step, mean, std):
        """Of the x_{t-1} that were sampled; (B,)."""
        return gaussian_log_prob(self.latents[sample, step + 1], mean, std)

    def _draws(self, sample, inner_epoch):
        keys = [(self.config.seed, self.epoch, inner_epoch, self.indices[i]) for i in sample.tolist()]
        x_0, embeds = self.latents[sample, -1], self.prompt_embeds[sample]
        return Draws(denoising_error(self.policy, x_0, keys, embeds, self.negative_embeds, self.config.train))

    @torch.no_grad()
    def rescore(self, plan):
        """Computes the old means and log-probs anew, in the batches of training. plan: of `plan_updates`. The last pass
        comes first, so that a transition that several passes see has the value that the first will find."""
        for minibatches in reversed(plan):
            for sample, step in minibatches:
                mean, std = self._mean_std(sample, step)
                self.old_means[sample, step] = mean
                self.old_log_probs[sample, step] = self._log_prob(sample, step, mean, std)

    def describe(self, sample, step):
        """Names a single transition in an error message."""
        timestep = f"timestep {int(self.timesteps[step])} of " if self.algorithm.process == "reverse" else ""
        return timestep + repr(self.prompts[sample])


def batches_differ(config, share):
    """Whether training composes its batches otherwise than sampling, `share` being the samples of an update on this
    process. A batch composed otherwise may round otherwise, which would look like a changed policy."""
    return config.sample.batch_size != config.train.batch_size or share % config.train.batch_size > 0


def must_rescore(config, algorithm, share):
    """Whether old log-probs must be computed again, as training will, for the ratio to be exactly 1 before any update:
    where batches differ, or where sampling is guided and training is not."""
    unguided = config.sample.guidance_scale > 1 and not config.train.guidance
    return algorithm.process == "reverse" and (batches_differ(config, share) or unguided)


def denoising_error(policy, x_0, keys, prompt_embeds, negative_embeds, options):
    """The loss that base models are trained by; its negative bounds log p_theta(x_0 | c) from below, up to weights of
    the timesteps (DDPM, arXiv 2006.11239, section 3.4).

    error = mean (network(x_t, t, c) - target)^2,  x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise

    with t uniform over the training timesteps and the target by `prediction_type`: noise, v or x_0.

    Args:
        x_0: (B, C, H, W), latents.
        keys: B tuples of integers, each of which alone determines its sample's t, noise and dropout.
        prompt_embeds: (B, L, D) of the prompts. negative_embeds: (1, L, D) of the empty prompt.
        options: `config.train`; a share `prompt_dropout` of the samples gets the empty prompt, which keeps guidance
            working.
    Returns:
        (B,) float32.
    """
    scheduler, drawn = policy.scheduler, []
    for key in keys:
        generator = torch_generator("denoising", *key)
        t = torch.randint(scheduler.config.num_train_timesteps, (), generator=generator)
        drawn.append((t, torch.rand((), generator=generator), torch.randn(x_0.shape[1:], generator=generator)))
    t, dropout, noise = (torch.stack(values).to(x_0.device) for values in zip(*drawn))
    embeds = torch.where((dropout < options.prompt_dropout)[:, None, None], negative_embeds, prompt_embeds)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x_0, noise, t), "sample": x_0}
    error = policy.forward(scheduler.add_noise(x_0, noise, t), t, embeds) - target[scheduler.config.prediction_type]
    return (error**2).mean(dim=(1, 2, 3))
