"""DDPO, Denoising Diffusion Policy Optimization (arXiv 2305.13301), from top to bottom.

    accelerate launch train.py --config config/emoji.py

A diffusion model draws by denoising: from pure noise x_T, every step samples x_{t-1} from a Gaussian whose mean the
network predicts. DDPO treats this as a Markov decision process. The state is (c, t, x_t) with c the prompt, the action
x_{t-1}, the policy p_theta(x_{t-1} | x_t, c), and the reward r(x_0, c) comes with the finished image. Each action's
likelihood is known exactly, so the policy gradient applies. With A the advantage of an image (its reward, compared
with that of others) and p_old the policy that sampled it, DDPO-IS minimises the mean over all transitions of

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),    rho = p_theta(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)

Sample i of epoch e, its prompt and all its noise, is a function of (seed, e, i). So neither batch sizes nor the
number of processes nor resuming changes what is computed. Deviations from the paper are named where they are made.
"""

import numpy as np
import torch
from accelerate.utils import gather_object

from ddpo import cli
from ddpo.batches import own_samples, plan_updates, samples_together, trained_steps
from ddpo.errors import InputError, choose
from ddpo.evaluation import load_evaluation, split_prompts
from ddpo.hardware import fit_batch_sizes
from ddpo.likelihood import Rollout, latents_kept, must_rescore
from ddpo.losses import ALGORITHMS
from ddpo.optimizer import Optimizer, blame_gradient
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy
from ddpo.prompts import check_length, draw_prompt, get_prompts
from ddpo.rewards import RewardQueue, get_reward
from ddpo.run import Run
from ddpo.stat_tracking import ADVANTAGES, PerPromptStatTracker
from ddpo.tracking import Means


def train(config, preset):
    run = Run(config, preset)  # its processes and device, its folder, Ctrl-C, checkpoints and logs
    prompt_set, held_out = split_prompts(get_prompts(config.prompts), config.held_out)
    reward = get_reward(config.reward, run.device, config.reward_options, prompt_set + held_out)
    algorithm = choose("algorithm", config.algorithm, ALGORITHMS)
    normalise = choose("advantage", config.advantage, ADVANTAGES)

    policy = load_policy(
        config.model, config.lora_rank, config.precision, run.device, config.lora_targets, config.seed, run.sharding
    )
    check_length([prompt for prompt, _ in prompt_set], policy.pipe.tokenizer)
    policy.prepare_sampling(config.sample)
    evaluate = load_evaluation(config, policy, reward, prompt_set, held_out)  # on fixed prompts and noise
    policy.prepare_training(config.train, "base" in algorithm.needs, config.sample.averaged)
    optimizer = Optimizer(policy.trainable_parameters(), config, run.accelerator)
    tracker = PerPromptStatTracker(**config.stats)

    # This process's samples of an epoch: (updates, samples of an update).
    indices = own_samples(config.sample.images_per_epoch, config.train.updates_per_epoch, run.rank, run.processes)
    samples_per_update, kept = indices.shape[1] * run.processes, latents_kept(config, algorithm.process)
    config.sample.batch_size, config.train.batch_size = fit_batch_sizes(policy, config, *indices.shape, kept)
    together = samples_together(config, algorithm)  # in a minibatch
    rescores = must_rescore(config, algorithm, indices.shape[1])
    if config.compile:
        guided = config.sample.guidance_scale > 1 and config.train.guidance
        policy.compile(config.train.batch_size * (1 + guided), config.sample.height, config.sample.width)
    noise_shape, indices = policy.noise_shape(config.sample), indices.flatten().tolist()
    run.start(policy, optimizer, tracker, prompt_set, evaluate)
    run.describe(len(prompt_set), samples_per_update, trained_steps(config, algorithm.process), rescores)

    for epoch in run.epochs():
        # 1. Sample: an image per prompt by the current policy, with its whole denoising trajectory.
        group = config.sample.images_per_prompt
        drawn = [draw_prompt(prompt_set, config.seed, epoch, i - i % group) for i in indices]
        prompts, metadata = [prompt for prompt, _ in drawn], [data for _, data in drawn]
        scores = RewardQueue(reward, prompts, metadata, config.reward_timeout, run.device, run.clock)
        with policy.sampling_weights():
            trajectories = sample_with_logprob(
                policy, prompts, lambda k: draw_noise(noise_shape, config.seed, epoch, indices[k]),
                config.sample.guidance_scale, policy.noise_level(config.sample), config.sample.batch_size,
                keep_steps=algorithm.process != "forward", progress="sampling" if run.is_main else None,
                stop=lambda: run.stopping(scores.failed()), on_images=scores.put,
            )  # fmt: skip
        if trajectories is None and run.interrupt.stopped:
            scores.cancel()
            break  # no weight has changed since the last epoch, which `run.finish` saves

        # 2. Reward: of each image; on a GPU computed while the next ones were sampled.
        rewards, reward_info = run.collect(scores)
        if not trajectories.latents.isfinite().all():
            raise InputError(
                f"epoch {epoch}: the network's output is not finite: a lower train.learning_rate or a higher precision "
                "may help, from an earlier checkpoint on"
            )

        # 3. Advantage: every process sees all samples, in the order of their indices, and computes the same advantages.
        everyone = sorted(gather_object(list(zip(indices, prompts, rewards.tolist()))))
        all_prompts, all_rewards = [prompt for _, prompt, _ in everyone], np.array([r for _, _, r in everyone])
        advantages = normalise(all_prompts, all_rewards, tracker)
        advantages = algorithm.weigh(all_rewards, advantages, all_prompts, config)[indices]
        advantages = torch.as_tensor(advantages, dtype=torch.float32, device=run.device)
        if np.ptp(all_rewards) == 0:
            run.print(f"warning: epoch {epoch}: the reward is {all_rewards[0]:g} for all: nothing to learn")

        # 4. Update: a few optimizer steps on the transitions x_t -> x_{t-1} of these samples.
        run.clock.lap("seconds_rewards")  # those that sampling did not hide
        rollout = Rollout(policy, config, algorithm, epoch, indices, prompts, trajectories)
        plan = plan_updates(config, algorithm, epoch, advantages)
        transitions = samples_per_update * trained_steps(config, algorithm.process)  # of an update, in all processes
        if rescores:
            with policy.sampling_weights():
                rollout.rescore(plan)

        def loss_of(sample, step):
            """The losses (B,) of a minibatch under the weights being trained, and what to log of them."""
            terms = rollout.score(sample, step)
            loss, info = algorithm.loss(terms, advantages[sample], config.train)
            if update == 0:  # nothing has been updated yet, so every ratio should be 1
                means.highest(ratio_error=terms.ratio_error())
            if config.train.kl_weight:
                loss, info["kl_base"] = loss + config.train.kl_weight * terms.kl_base, terms.kl_base.detach()
            return loss, info

        means, bar = Means(), run.bar(sum(len(sample) for batches in plan for sample, _ in batches), "training")
        for update, minibatches in enumerate(plan):
            with policy.masters.unchanged():
                for sample, step in minibatches:
                    loss, info = loss_of(sample, step)
                    # Summed over minibatches and processes, this is the mean over the update's transitions.
                    optimizer.backward(loss.sum() / transitions)
                    means.add(loss=loss.detach(), **info)
                    bar.update(len(sample))
            if config.train.target_kl and means.latest("kl_old", transitions, run.accelerator) > config.train.target_kl:
                optimizer.discard()
                break  # the policy is far enough from the one that sampled
            if not optimizer.clip():
                where = f"epoch {epoch}, update {update}"
                blame_gradient(where, optimizer.parameters, minibatches, loss_of, rollout.describe, together)
            optimizer.step(epoch * len(plan) + update)
            policy.update_ema()
        bar.close()

        # 5. Log: means over the epoch, images of fixed prompts and noise, a checkpoint.
        trajectories = rollout = None  # room for other images
        run.log({
            **run.mean_info(reward_info), "reward_mean": float(all_rewards.mean()),
            "reward_std": float(all_rewards.std()), **optimizer.summary(),
            **means.over((update + 1) * transitions, run.accelerator),
        })  # fmt: skip
    run.finish()


if __name__ == "__main__":
    cli.run(train)
