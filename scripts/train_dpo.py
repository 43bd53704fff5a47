"""Finetunes a model on people's choices between two pictures: Diffusion-DPO (arXiv 2311.12908), which needs no reward
model and draws no images.

    python -m scripts.train_dpo --choices runs/annotations-emoji/choices.jsonl --config.run_dir=runs/my-dpo
    python -m scripts.train_dpo --choices A.jsonl B.jsonl --model FOLDER --config.lora_rank=16 --config.num_epochs=40
    python -m scripts.train_dpo --config.resume=runs/my-dpo

--choices takes files of scripts.annotate, of any number of raters; without --config the preset is config/dpo.py. The
run's folder is like any other's: scripts.sample, scripts.evaluate, scripts.plot and scripts.publish work on it.

Of all policies, the one that raises a reward r(x, c) most, at the price of beta times its KL divergence from the base
model, has r = beta log(p_theta / p_base) up to a constant of the prompt. Put into Bradley and Terry's P(a is chosen)
= sigmoid(r(a) - r(b)), this makes the likelihood of the choices a loss on the policy. A diffusion model's log p is not
known, so its bound stands in for it, minus the denoising error, at one timestep t with one noise for both pictures:

    r(x_0) = -beta / 2 (error(x_0) - base_error(x_0)),    error(x_0) = mean (network(x_t, t, c) - target)^2
    loss   = -log sigmoid(r(chosen) - r(rejected))

A tie counts as half a choice of each, as in scripts.train_reward. The mean is over the latent's d dimensions: what
carries over from one size to another is beta / d. --loss sft is the baseline: the error of the chosen images itself.
"""

import argparse
import os
import sys

import torch
from PIL import Image
from torch.nn import functional as F

from ddpo import cli
from ddpo.batches import own_samples
from ddpo.errors import InputError, choose
from ddpo.evaluation import load_evaluation
from ddpo.likelihood import draw_timesteps_and_noise, mean_square, noised
from ddpo.losses import preference_margin
from ddpo.optimizer import Optimizer, blame_gradient
from ddpo.pipeline_logprob import encode
from ddpo.policy import load_policy
from ddpo.prompts import check_length
from ddpo.reward_model import VOTES, read_choices
from ddpo.run import Run
from ddpo.seeds import numpy_generator
from ddpo.stat_tracking import PerPromptStatTracker
from ddpo.tracking import Means

MEASURED = 4  # draws of (timestep, noise) by which a pair is measured


# ---------------------------------------------------------------------------------------------------------- the losses
def correct(margin, vote):
    """1 (B,) where a margin has the sign of the vote (1: left, 0: right), 0 where it has not; 0.5 at 0 and for ties."""
    return 1 - (vote - 0.5 - 0.5 * margin.sign()).abs()


def dpo(error, base_error, vote, beta):
    """The loss (B,) of the votes (B,): 1 for left, 0 for right, 0.5 for a tie; and {name: (B,)} to log."""
    r = preference_margin(error, base_error, beta)  # r(left) - r(right)
    loss = F.binary_cross_entropy_with_logits(r, vote, reduction="none")
    return loss, {"accuracy": correct(r.detach(), vote), "margin": (r.detach() * (2 * vote - 1))}


def sft(error, base_error, vote, beta):
    """Supervised finetuning on the chosen images."""
    return vote * error[0] + (1 - vote) * error[1], {}


LOSSES = {"dpo": dpo, "sft": sft}


# ----------------------------------------------------------------------------------------------------------- the pairs
def hold_out(votes, share, seed):
    """(votes to learn from, votes held out): the latter on a share of the different pairs of images. Votes on others
    that show an image of those are in neither. Raises InputError if one of the two would be empty."""
    keys = list(dict.fromkeys(tuple(sorted((vote["left"], vote["right"]))) for vote in votes))
    count = round(share * len(keys))
    if share and not 0 < count < len(keys):
        raise InputError(
            f"held_out_choices = {share:g} of {len(keys)} pairs leaves none {'out' if not count else 'in'}"
        )
    chosen = {keys[i] for i in numpy_generator("split", seed).permutation(len(keys))[:count]}
    shown = {name for key in chosen for name in key}
    held_out = [vote for vote in votes if tuple(sorted((vote["left"], vote["right"]))) in chosen]
    kept = [vote for vote in votes if not shown & {vote["left"], vote["right"]}]
    if not kept:
        raise InputError("every pair shares an image with those of held_out_choices: hold out fewer")
    return kept, held_out


def draw_row(seed, position, count):
    """Which of `count` votes is at a position in the order of training: each turn sees all, reordered."""
    turn, place = divmod(position, count)
    return int(numpy_generator("pairs", seed, turn).permutation(count)[place])


def encode_files(policy, names, height, width):
    """{name: latent (C, h, w) on the CPU} of image files, cut and scaled to height x width: the means that the VAE
    gives them. Raises InputError that names a file that is no image."""
    factor, latents = policy.pipe.vae_scale_factor, {}
    for name in dict.fromkeys(names):
        try:
            picture = Image.open(name).convert("RGB")
        except OSError as error:
            raise InputError(f"the image {name} cannot be read: {error}") from error
        latent = encode(policy.vae, [picture], width, height)
        assert latent.shape[-2:] == (height // factor, width // factor)
        latents[name] = latent[0].cpu()
    return latents


class Pairs:
    """Votes on pairs of images, and how a policy and its base model denoise these."""

    def __init__(self, policy, votes, latents, options):
        """latents: of `encode`. options: `config.train`."""
        self.policy, self.votes, self.latents, self.options = policy, votes, latents, options
        self.vote = torch.tensor([VOTES[vote["choice"]] for vote in votes], device=policy.device)

    def errors(self, rows, keys, needs_base=True, t=None):
        """Denoising errors (2, B) of the images of B votes, left first, by the policy and by its base model (None
        unless `needs_base`).

        Args:
            rows: B indices of votes.
            keys: B tuples of integers that determine t, noise and dropout, which the two images of a pair share.
            t: (B,), in place of the timesteps drawn; no prompt is dropped then.
        """
        policy = self.policy
        x_0 = torch.stack([self.latents[self.votes[i][side]] for side in ("left", "right") for i in rows])
        x_0, prompts = x_0.to(policy.device), [self.votes[i]["prompt"] for i in rows]
        draws = draw_timesteps_and_noise(policy, keys, x_0.shape[1:], self.options)
        drawn, dropped, noise = (values[:, 0] for values in draws)
        embeds = policy.embed(prompts)
        if t is None:
            t, embeds = drawn, embeds.replace(dropped, policy.embed([""]))
        t, embeds = t.repeat(2), embeds.join(embeds)
        x_t, target, _ = noised(policy.scheduler, x_0, noise.repeat(2, 1, 1, 1), t)
        base_error = None
        if needs_base:
            with torch.no_grad(), policy.base():
                base_error = mean_square(policy.forward(x_t, t, embeds) - target).view(2, -1)
        return mean_square(policy.forward(x_t, t, embeds) - target).view(2, -1), base_error

    @torch.no_grad()
    def measure(self, batch_size):
        """The share of the votes, ties aside, that the policy's implicit reward agrees with, and the loss; at timesteps
        and noises that are always the same."""
        steps, margins = self.policy.scheduler.config.num_train_timesteps, []
        for rows in torch.arange(len(self.votes)).split(batch_size):
            total = 0
            for k in range(MEASURED):
                t = torch.full((len(rows),), int((k + 0.5) * steps / MEASURED), device=self.policy.device)
                errors = self.errors(rows.tolist(), [(i, k) for i in rows.tolist()], t=t)
                total = total + preference_margin(*errors, self.options.dpo_beta) / MEASURED
            margins.append(total)
        margins = torch.cat(margins)
        clear = self.vote != 0.5
        loss = F.binary_cross_entropy_with_logits(margins, self.vote)
        return {
            "accuracy": float(correct(margins, self.vote)[clear].mean()),
            "loss": float(loss),
            "votes": int(clear.sum()),
        }


# ------------------------------------------------------------------------------------------------------------- the loop
def train(config, preset):
    config.reward, config.sample.images_per_prompt = "", 2  # an epoch's images come in pairs
    config.algorithm, config.train.draws, config.train.inner_epochs = "dpo", 1, 1
    config.train.kl_weight = 0.0  # the loss itself ties the policy to the base model
    run = Run(config, preset, "python -m scripts.train_dpo")
    loss_function = choose("loss", config.choices_loss, LOSSES)
    needs_base = config.choices_loss == "dpo"
    if not config.choices:
        raise InputError("--choices names the files of scripts.annotate to learn from")
    votes = [vote for vote in read_choices(config.choices.split(",")) if vote["choice"] != "skip"]
    if config.choices_loss == "sft":
        votes = [vote for vote in votes if vote["choice"] != "tie"]
    if not votes:
        raise InputError(f"{config.choices}: there are no choices")
    votes, held_out = hold_out(votes, config.held_out_choices, config.seed)

    policy = load_policy(
        config.model, config.lora_rank, config.precision, run.device, config.lora_targets, config.seed, run.sharding
    )
    texts = sorted({vote["prompt"] for vote in votes + held_out})
    check_length(texts, policy.pipe.tokenizer)
    policy.prepare_sampling(config.sample)
    prompt_set, config.prompts = [(text, {}) for text in texts], os.path.join(run.folder, "prompts.txt")
    policy.prepare_training(config.train, needs_base=True)
    optimizer = Optimizer(policy.trainable_parameters(), config, run.accelerator)
    factor = policy.pipe.vae_scale_factor
    height, width = (side * factor for side in policy.latent_shape(config.sample.height, config.sample.width)[1:])
    names = [vote[side] for vote in votes + held_out for side in ("left", "right")]
    latents = encode_files(policy, names, height, width)
    pairs = Pairs(policy, votes, latents, config.train)

    # This process's pairs of an epoch: (updates, pairs of an update), of which each is the next one of a permutation.
    indices = own_samples(config.sample.images_per_epoch // 2, config.train.updates_per_epoch, run.rank, run.processes)
    in_epoch, share = config.sample.images_per_epoch // 2, indices.shape[1]
    batch_size = min(config.train.batch_size or share, share)
    judge = load_evaluation(config, policy, None, prompt_set, []) if config.evaluate.rewards else dict
    sets = {"choices, seen": Pairs(policy, votes[: max(1, len(held_out))], latents, config.train)}
    sets |= {"choices, held_out": Pairs(policy, held_out, latents, config.train)} if held_out else {}
    measured = (
        (lambda: judge() | {name: s.measure(batch_size) for name, s in sets.items()}) if config.evaluate.every else None
    )
    run.start(policy, optimizer, PerPromptStatTracker(**config.stats), prompt_set, measured)
    if run.is_main:
        with open(config.prompts, "w", encoding="utf-8") as f:  # for scripts.evaluate
            f.writelines(" ".join(text.split()) + "\n" for text in texts)
    run.print(
        f"{run.folder}: {config.choices_loss} on {len(votes)} votes ({int((pairs.vote == 0.5).sum())} ties) of "
        f"{len({vote['rater'] for vote in votes})} rater(s), {len(held_out)} held out\n"
        f"epochs {run.done} to {config.num_epochs - 1}, each {config.train.updates_per_epoch} updates of "
        f"{share * run.processes} pairs: in all, every vote {config.num_epochs * in_epoch / len(votes):.1f} times"
    )

    def row_of(epoch, index):
        return draw_row(config.seed, epoch * in_epoch + index, len(votes))

    for epoch in run.epochs():
        if run.stopping():
            break

        def loss_of(batch):
            """The losses (B,) of this process's pairs `batch` (B,) of the epoch, and what to log of them."""
            rows = [row_of(epoch, i) for i in batch.tolist()]
            keys = [(config.seed, epoch, i) for i in batch.tolist()]
            error, base_error = pairs.errors(rows, keys, needs_base)
            return loss_function(error, base_error, pairs.vote[rows], config.train.dpo_beta)

        means, bar = Means(), run.bar(indices.size, "training")
        for update, mine in enumerate(torch.from_numpy(indices)):
            for batch in mine.split(batch_size):
                loss, info = loss_of(batch)
                optimizer.backward(loss.sum() / (share * run.processes))
                means.add(loss=loss.detach(), **info)
                bar.update(len(batch))
            if not optimizer.clip():
                where, minibatches = f"epoch {epoch}, update {update}", [(batch,) for batch in mine.split(batch_size)]
                blame_gradient(where, optimizer.parameters, minibatches, loss_of,
                               lambda i: repr(votes[row_of(epoch, int(i))]["prompt"]))  # fmt: skip
            optimizer.step(epoch * len(indices) + update)
            policy.update_ema()
        bar.close()
        run.log({**optimizer.summary(), **means.over(in_epoch, run.accelerator)})
    run.finish()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="All other options are those of train.py, --config.KEY=VALUE, listed in config/base.py.",
    )  # fmt: skip
    parser.add_argument("--choices", nargs="+", default=[], help="JSONL files of scripts.annotate")
    parser.add_argument("--model", default="", help="the base model: folder or hub name; default: the preset's")
    parser.add_argument("--loss", default="", choices=LOSSES, help="default: dpo")
    args, rest = parser.parse_known_args()
    comma = next((path for path in args.choices if "," in path), None)
    if comma:
        sys.exit(f"error: --choices {comma}: a path with a comma in it; rename it")
    if not any(word.split("=")[0] in ("--config", "--config.resume") for word in rest):
        rest.append("--config=config/dpo.py")
    given = {"choices": ",".join(args.choices), "model": args.model, "choices_loss": args.loss}
    sys.argv = [sys.argv[0], *rest, *(f"--config.{key}={value}" for key, value in given.items() if value)]
    cli.run(train)


if __name__ == "__main__":
    main()
