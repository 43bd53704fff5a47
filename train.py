"""DDPO: finetunes a diffusion model with reinforcement learning. The whole loop, top to bottom.

    accelerate launch train.py --config config/emoji.py

Each epoch: sample pictures with the current weights and record their denoising trajectories; score them; turn the
scores into advantages; take a few policy-gradient steps on the single transitions (x_t, t) -> x_{t-1}; log; save.
(Reward-weighted regression, for comparison, takes its steps on the denoising loss of the pictures' latents x_0.)

Sample i of epoch e, its prompt and all its noise, is a function of (seed, e, i). It belongs to optimizer update
i // samples_per_update, and each update's samples are split over the processes in order. So neither batch sizes nor the
number of processes nor a resume changes what is computed.
"""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ddpo import cli, guards, prompts, rewards
from ddpo.checkpoint import load_checkpoint, save_checkpoint, truncate_metrics
from ddpo.ddim_logprob import step_stds
from ddpo.errors import InputError, choose
from ddpo.evaluation import draw_grid, load_evaluation, split_prompts
from ddpo.hardware import fit_batch_sizes, peak_memory_gb, use_cpu
from ddpo.losses import ALGORITHMS, TIMESTEPS
from ddpo.options import check
from ddpo.pipeline_logprob import draw_noise, sample_log_prob, sample_with_logprob, step_log_prob
from ddpo.policy import load_policy
from ddpo.stat_tracking import ADVANTAGES, PerPromptStatTracker
from ddpo.tracking import Stopwatch, describe_run, log_metrics, start_run, start_tracker


def train(config, preset):
    # ------------------------------------------------------------------------------------------------------- set up
    check(config, PartialState(cpu=not torch.accelerator.is_available()).num_processes)
    run_dir = config.resume or config.run_dir or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = broadcast_object_list([run_dir])[0]  # clocks differ
    accelerator = Accelerator(log_with=config.tracker or None, project_dir=run_dir)
    rank, processes = accelerator.process_index, accelerator.num_processes
    sample, opt = config.sample, config.train
    prompt_set, held_out = split_prompts(prompts.get_prompts(config.prompts), config.held_out)
    reward_fn = rewards.get_reward(config.reward, accelerator.device, config.reward_options, prompt_set + held_out)
    weigh, algorithm, likelihood = choose("algorithm", config.algorithm, ALGORITHMS)
    advantage = choose("advantage", config.advantage, ADVANTAGES)
    choose_steps = choose("timestep choice", opt.timestep_choice, TIMESTEPS)

    device = accelerator.device
    if device.type == "cpu":
        accelerator.print(
            f"no GPU: {processes} process(es) with {use_cpu(config.threads, processes)} CPU thread(s) each"
        )
    targets = config.lora_targets.replace(" ", "").split(",")
    policy = load_policy(config.model, config.lora_rank, config.precision, device, targets, config.seed)
    if opt.gradient_checkpointing:
        policy.unet.enable_gradient_checkpointing()
    prompts.check_length([prompt for prompt, _ in prompt_set], policy.pipe.tokenizer)
    policy.set_timesteps(sample.num_steps)
    noise_shape = (sample.num_steps + 1, *policy.latent_shape(sample.height, sample.width))

    evaluate = load_evaluation(config, policy, reward_fn, prompt_set, held_out) if config.evaluate.every else None

    policy.keep(base=opt.kl_weight > 0, ema_decay=opt.ema_decay)
    parameters = policy.trainable_parameters()
    adam = opt.learning_rate, (opt.adam_beta1, opt.adam_beta2), opt.adam_epsilon, opt.adam_weight_decay
    optimizer = torch.optim.AdamW(parameters, *adam, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    tracker = PerPromptStatTracker(config.stats.buffer_size, config.stats.min_count, config.stats.max_age)

    # Global sample indices of this process: update by update, its share of each.
    updates = opt.updates_per_epoch
    per_update = sample.images_per_epoch // updates  # samples in an update, over all processes
    share = per_update // processes  # of which this process has so many
    mine = [u * per_update + rank * share + k for u in range(updates) for k in range(share)]
    # (An update of a sample's own likelihood sees one timestep, drawn anew from all that there are.)
    trained_steps = round(opt.timestep_fraction * sample.num_steps) if likelihood == "step" else 1
    guidance = sample.guidance_scale if opt.guidance else 1.0  # in training
    stds = step_stds(policy.scheduler, sample.eta).to(device)
    ratio_scale = stds / stds.mean() if opt.sigma_weighting else torch.ones_like(stds)
    sample.batch_size, opt.batch_size = fit_batch_sizes(policy, parameters, config, noise_shape, share, len(mine))
    if config.compile:
        policy.compile((opt.batch_size * (2 if guidance > 1 else 1), *noise_shape[1:]))
    # A batch composed otherwise may round otherwise, which would look like a changed policy: the old log-probs are then
    # computed again as training will, so that the ratio is exactly 1 before any update.
    unlike = sample.batch_size != opt.batch_size or share % opt.batch_size > 0
    recompute = likelihood == "step" and (unlike or guidance != sample.guidance_scale)

    first_epoch, saved = 0, None  # saved: epochs in the newest checkpoint
    if config.resume:
        first_epoch = saved = load_checkpoint(run_dir, policy, optimizer, scaler, tracker)
        if first_epoch >= config.num_epochs:
            raise InputError(
                f"{run_dir} has done {first_epoch} epochs: to go on, --config.num_epochs={2 * first_epoch}"
            )
    elif accelerator.is_main_process and os.path.exists(os.path.join(run_dir, "metrics.jsonl")):
        raise InputError(f"{run_dir} holds a run: continue it with --config.resume={run_dir}, or choose another folder")
    guards.check_processes_agree(accelerator, parameters, first_epoch)
    if accelerator.is_main_process:
        start_run(run_dir, config)
        truncate_metrics(run_dir, first_epoch)
    start_tracker(accelerator, run_dir, config)
    trained_weights = sum(p.numel() for p in parameters)
    accelerator.print(describe_run(run_dir, config, first_epoch, len(prompt_set), trained_weights, trained_steps))
    if recompute and unlike:
        accelerator.print(
            "sample.batch_size and train.batch_size compose batches differently, so old log-probs are computed again, "
            f"which takes a forward pass. Equal sizes that divide {share}, or 0 for both, spare it"
        )

    def look(epoch, grid, measure):
        """Pictures of the same prompts and noise in every epoch: drawn for the eye, and measured."""
        grid, measure = grid and accelerator.is_main_process, measure and evaluate
        with policy.averaged() if grid or measure else contextlib.nullcontext():
            if grid:
                path = os.path.join(run_dir, "images", f"epoch_{epoch:04d}.png")
                draw_grid(policy, prompt_set, config.grid_images, sample, noise_shape, config.seed).save(path)
            if measure:
                measured = evaluate()
                if accelerator.is_main_process:
                    log_metrics(accelerator, run_dir, {"epoch": epoch, **measured}, "evaluation")

    scorer = ThreadPoolExecutor(1)
    interrupt = guards.Interrupt()
    if first_epoch == 0:
        look(0, True, True)
    epochs = tqdm(range(first_epoch, config.num_epochs), "epochs", config.num_epochs, initial=first_epoch,
                  unit="epoch", disable=not accelerator.is_main_process)  # fmt: skip
    for epoch in epochs:
        clock = Stopwatch()

        # --------------------------------------------------------------------------------------------------- sample
        group = sample.images_per_prompt
        drawn = [prompts.draw_prompt(prompt_set, config.seed, epoch, i - i % group) for i in mine]
        my_prompts, my_metadata = [p for p, _ in drawn], [m for _, m in drawn]
        scores = []

        def score(first, images):
            """Scores a batch of pictures in the background; on a CPU, whose cores are taken, at once."""
            batch = slice(first, first + len(images))
            arguments = (reward_fn, images, my_prompts[batch], my_metadata[batch], config.reward_timeout)
            scores.append(scorer.submit(rewards.compute_rewards, *arguments))
            clock.lap("seconds_sampling")
            if device.type == "cpu":
                scores[-1].result()
                clock.lap("seconds_rewards")

        trajectories = sample_with_logprob(
            policy, my_prompts, lambda k: draw_noise(noise_shape, config.seed, epoch, mine[k]), sample.guidance_scale,
            sample.eta, sample.batch_size, progress="sampling" if accelerator.is_main_process else None,
            stop=lambda: interrupt.any(accelerator), on_images=score,
        )  # fmt: skip
        if trajectories is None:  # interrupted: no weight has changed since the last epoch, which is saved below
            break
        _, latents, old_log_probs, timesteps = trajectories
        clock.lap("seconds_sampling")
        if not latents.isfinite().all():
            raise InputError(
                f"epoch {epoch}: the network's output is not finite: a lower train.learning_rate or a higher precision "
                "may help, from an earlier checkpoint on"
            )

        # ----------------------------------------------------------------------------------- rewards and advantages
        scored = [future.result() for future in scores]
        my_rewards = np.concatenate([values for values, _ in scored])
        reward_info = {key: np.concatenate([info[key] for _, info in scored]) for key in scored[0][1]}
        # Every process sees the whole round, in the order of the sample indices, and computes the same advantages.
        whole = sorted(gather_object(list(zip(mine, my_prompts, my_rewards.tolist()))))
        all_rewards = np.array([reward for _, _, reward in whole])
        all_prompts = [prompt for _, prompt, _ in whole]
        weights = weigh(all_rewards, advantage(all_prompts, all_rewards, tracker), all_prompts, opt)
        weights = torch.as_tensor(weights[mine], dtype=torch.float32, device=device)
        if np.ptp(all_rewards) == 0:
            accelerator.print(f"warning: epoch {epoch}: the reward is {all_rewards[0]:g} for all: nothing to learn")
        clock.lap("seconds_rewards")  # those that sampling did not hide

        # -------------------------------------------------------------------------------------------------- updates
        prompt_embeds, negative_embeds = policy.embed(my_prompts), policy.embed([""])
        totals, ratio_error, grad_norms = {}, torch.zeros((), device=device), []
        bar = tqdm(total=len(mine) * trained_steps * opt.inner_epochs, desc="training", unit="step", leave=False,
                   disable=not accelerator.is_main_process)  # fmt: skip

        def transitions(inner, update, batch_size):
            """Batches of (sample, step) indices of all transitions of an update, timestep by timestep: they are then
            composed as in sampling. Deviation from the port: timesteps are left out per update, not per sample."""
            rng = np.random.default_rng((config.seed, epoch, inner, update, 3))
            steps = choose_steps(rng, sample.num_steps, trained_steps)
            rows = torch.arange(update * share, (update + 1) * share, device=device)
            if likelihood == "sample":  # without those that count nothing; but every process needs a gradient to add
                rows = rows[weights[rows] != 0] if weights[rows].any() else rows[:1]
            columns = torch.as_tensor(steps, device=device).repeat_interleave(len(rows))
            return zip(rows.repeat(trained_steps).split(batch_size), columns.split(batch_size))

        def log_prob_of(inner, row, column, with_kl=False):
            """log p_theta of B transitions, or of B samples, and if asked for the transitions' KL from the base."""
            embeds = prompt_embeds[row], negative_embeds
            if likelihood == "sample":
                keys = [(config.seed, epoch, inner, mine[i]) for i in row.tolist()]
                return sample_log_prob(policy, latents[row, -1], keys, *embeds, opt.prompt_dropout), None
            x_t, x_next, t = latents[row, column], latents[row, column + 1], timesteps[column]
            log_prob, kl = step_log_prob(policy, x_t, x_next, t, *embeds, guidance, sample.eta, with_kl)
            return log_prob * ratio_scale[column], kl

        def loss_of(inner, row, column):
            """Their losses (B,), and what to log of them."""
            log_prob, kl = log_prob_of(inner, row, column, opt.kl_weight > 0)
            old_log_prob = old_log_probs[row, column] if likelihood == "step" else log_prob.detach()
            loss, info = algorithm(log_prob, old_log_prob, weights[row], opt)
            if kl is not None:
                loss, info["kl_base"] = loss + opt.kl_weight * kl, kl.detach()
            return loss, info | {"ratio_error": torch.expm1(log_prob.detach() - old_log_prob).abs()}

        old_log_probs *= ratio_scale
        if recompute:
            passes = 1 if trained_steps == sample.num_steps else opt.inner_epochs  # which draw other steps
            with torch.no_grad():  # the last pass first: a transition of several then has what the first will find
                for inner, update in reversed(list(np.ndindex(passes, updates))):
                    for row, column in transitions(inner, update, opt.batch_size):
                        old_log_probs[row, column] = log_prob_of(inner, row, column)[0]

        for inner, update in np.ndindex(opt.inner_epochs, updates):
            for row, column in transitions(inner, update, opt.batch_size):
                loss, info = loss_of(inner, row, column)
                error = info.pop("ratio_error").max()
                if inner == update == 0:  # nothing has been updated yet: the ratio should be 1
                    ratio_error = torch.maximum(ratio_error, error)
                # Summed over the processes' batches, this is the mean over the update's transitions.
                scaler.scale(loss.sum() / (per_update * trained_steps)).backward()
                for key, value in {"loss": loss.detach(), **info}.items():
                    totals[key] = totals.get(key, 0) + value.sum()
                bar.update(len(row))
            if processes > 1:
                for p in parameters:
                    p.grad = accelerator.reduce(p.grad, "sum")
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, opt.max_grad_norm)
            # fp16's gradient overflows now and then: the scaler then skips the step and scales less.
            overflow = scaler.is_enabled() and scaler.get_scale() >= 1 and accelerator.reduce(totals["loss"]).isfinite()
            if torch.isfinite(grad_norm):
                grad_norms.append(float(grad_norm))
            elif not overflow:
                guards.blame_gradient(
                    f"epoch {epoch}, update {update}", parameters, transitions(inner, update, 1),
                    lambda row, column: loss_of(inner, row, column)[0],
                    lambda row, column: (f"timestep {int(timesteps[column])} of " if likelihood == "step" else "")
                    + repr(my_prompts[row]),
                )  # fmt: skip
            done = (epoch * opt.inner_epochs + inner) * updates + update  # updates, in all epochs
            optimizer.param_groups[0]["lr"] = opt.learning_rate * min(1, (done + 1) / max(1, opt.warmup_updates))
            scaler.step(optimizer)
            scaler.update()
            policy.update_ema()
            optimizer.zero_grad()
        bar.close()

        # --------------------------------------------------------------------------------------------- log and save
        guards.check_processes_agree(accelerator, parameters, epoch + 1)
        clock.lap("seconds_training")
        transition_count = sample.images_per_epoch * trained_steps * opt.inner_epochs
        infos = gather_object([{key: float(value.sum()) for key, value in reward_info.items()}])
        metrics = {
            **{key: sum(i[key] for i in infos) / sample.images_per_epoch for key in reward_info},
            "epoch": epoch,
            "reward_queries": (epoch + 1) * sample.images_per_epoch,
            **clock.seconds,
            "peak_memory_gb": peak_memory_gb(device),
            "reward_mean": float(all_rewards.mean()),
            "reward_std": float(all_rewards.std()),
            "images_per_second": sample.images_per_epoch / clock.seconds["seconds"],
            **{key: float(accelerator.reduce(value, "sum")) / transition_count for key, value in totals.items()},
            "ratio_error": float(accelerator.gather(ratio_error).max()),
            "grad_norm": float(np.mean(grad_norms)) if grad_norms else 0.0,
        }
        reached = metrics["reward_mean"] >= config.stop_reward
        last = reached or epoch + 1 == config.num_epochs
        if accelerator.is_main_process:
            log_metrics(accelerator, run_dir, metrics)
            shown = ("reward_mean", "reward_std", "approx_kl", "clip_fraction", "ratio_error", "grad_norm", "seconds")
            tqdm.write(f"epoch {epoch:3d}  " + "  ".join(f"{k} {metrics[k]:.4g}" for k in shown if k in metrics))
            if metrics["ratio_error"] > opt.clip_range:
                tqdm.write(guards.RATIO_WARNING.format(metrics["ratio_error"], opt.clip_range))
            if reached:
                tqdm.write(f"the mean reward has reached stop_reward = {config.stop_reward:g}")
        trajectories = latents = prompt_embeds = None  # room for other pictures
        due = [last or (every and (epoch + 1) % every == 0) for every in (config.grid_every, config.evaluate.every)]
        failed = True
        try:
            look(epoch + 1, *due)
            failed = False
        finally:  # a judge that is only to measure must not cost the rounds since the last checkpoint
            if accelerator.is_main_process and (failed or last or (epoch + 1) % config.save_every == 0):
                save_checkpoint(run_dir, epoch + 1, policy, optimizer, scaler, tracker, config.keep_checkpoints)
                saved = epoch + 1
        accelerator.wait_for_everyone()
        if last:
            break
    epochs.close()
    scorer.shutdown(wait=False, cancel_futures=True)
    if interrupt.stopped and accelerator.is_main_process and saved != epoch:
        save_checkpoint(run_dir, epoch, policy, optimizer, scaler, tracker, config.keep_checkpoints)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if interrupt.stopped:
        interrupt.exit(f"saved after {epoch} epochs. To go on: accelerate launch train.py --config.resume={run_dir}")
    accelerator.print(
        f"done: {run_dir} holds metrics.jsonl, images/ and checkpoints/.\n"
        f'Base and finetuned side by side: python -m scripts.sample --run {run_dir} --prompts "a cat"'
    )


if __name__ == "__main__":
    cli.run(train)
