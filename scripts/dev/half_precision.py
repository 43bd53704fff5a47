"""How near full finetuning in bf16 with float32 masters is to float32's, on the embedded model, on a CPU:

    python -m scripts.dev.half_precision --json results/bench/half-precision.json

Against float32 stand bf16; float32 in minibatches of half the size, which differs by rounding alone; and float32 on
other pictures, which differs as one update's gradient does from the next one's. First the gradients at each denoising
step, of the log-probs of the same steps weighted by the same advantages. Then the weights after a few updates, for
which each samples by its own network, and the pictures that it draws of fresh noise then.
"""

import argparse
import json
import time

import torch

from config.emoji import get_config
from ddpo.errors import at_least, check_output, run_script
from ddpo.likelihood import Rollout
from ddpo.losses import ALGORITHMS
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy
from ddpo.prompts import draw_prompt, get_prompts
from ddpo.rewards import jpeg_size
from scripts.provenance import commit, processor

CONTESTANTS = {  # precision, minibatches, seed of the noise
    "fp32": ("fp32", 1, 0), "bf16": ("bf16", 1, 0),
    "fp32, other minibatches": ("fp32", 2, 0), "fp32, other pictures": ("fp32", 1, 1),
}  # fmt: skip


class Contestant:
    def __init__(self, config, precision, minibatches, seed):
        self.policy, self.config, self.seed = load_policy(config.model, 0, precision, "cpu"), config, seed
        self.policy.prepare_sampling(config.sample)
        self.minibatches = torch.arange(config.sample.images_per_epoch).chunk(minibatches)

    def rollout(self, epoch, trajectories=None):
        """Of an epoch's pictures, or of those given; the pictures' sizes, kB; their advantages."""
        config, policy, indices = self.config, self.policy, range(self.config.sample.images_per_epoch)
        prompts = [draw_prompt(get_prompts(config.prompts), 0, epoch, i)[0] for i in indices]
        trajectories = trajectories or sample_with_logprob(
            policy, prompts, lambda i: draw_noise(policy.noise_shape(config.sample), self.seed, epoch, i),
            config.sample.guidance_scale, config.sample.eta, keep_steps=True,
        )  # fmt: skip
        rollout = Rollout(policy, config, ALGORITHMS["ddpo_is"], epoch, list(indices), prompts, trajectories)
        sizes = torch.tensor(jpeg_size(trajectories.images), dtype=torch.float32)
        return rollout, trajectories, sizes.mean().item(), (sizes.mean() - sizes) / sizes.std()

    def gradient(self, rollout, steps, loss):
        """Of the sum of loss(terms, which samples) over these steps of all pictures, (number of weights,)."""
        for p in self.policy.trainable_parameters():
            p.grad = None
        for sample in self.minibatches:
            for step in steps:
                loss(rollout.score(sample, torch.full_like(sample, step)), sample).sum().backward()
        return torch.cat([p.grad.flatten() for p in self.policy.trainable_parameters()])


def compare(ours, exact):
    """Cosine, and the ratio of the norms."""
    ours, exact = ours.double(), exact.double()
    return {"cosine": float(ours @ exact / ours.norm() / exact.norm()), "norm": float(ours.norm() / exact.norm())}


def gradients(contestants):
    """Of each but float32, per denoising step, against float32's."""
    exact = contestants["fp32"]
    _, theirs, _, advantages = exact.rollout(0)
    reference, found = {}, {}
    for name, contestant in contestants.items():
        other = contestant.seed != exact.seed
        rollout, _, _, weights = contestant.rollout(0, None if other else theirs)
        weights = weights if other else advantages
        for step in range(exact.config.sample.num_steps):
            gradient = contestant.gradient(rollout, [step], lambda terms, sample: terms.log_prob * weights[sample])
            if contestant is exact:
                reference[step] = gradient
            else:
                found.setdefault(name, []).append(compare(gradient, reference[step]))
    return found


def updates(contestants, count):
    """Of each, after so many updates: how far its weights moved, against float32's; kB a picture, before each and at
    the end; the largest |ratio - 1| before an update."""
    found, exact = {}, None
    for name, contestant in contestants.items():
        config, parameters = contestant.config, contestant.policy.trainable_parameters()
        steps = range(config.sample.num_steps)
        start = torch.cat([p.detach().flatten() for p in parameters])
        optimizer = torch.optim.AdamW(parameters, config.train.learning_rate)
        kb, errors = [], []
        for update in range(count):
            rollout, _, size, advantages = contestant.rollout(update)

            def loss(terms, sample):
                errors.append(float(terms.ratio_error().max()))
                losses, _ = ALGORITHMS["ddpo_is"].loss(terms, advantages[sample], config.train)
                return losses / len(steps) / len(advantages)

            contestant.gradient(rollout, steps, loss)
            torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
            optimizer.step()
            kb.append(size)
        kb.append(contestant.rollout(count)[2])
        moved = torch.cat([p.detach().flatten() for p in parameters]) - start
        exact = moved if exact is None else exact
        found[name] = compare(moved, exact) | {"kb": kb, "ratio_error": max(errors)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least(2), default=4, help="images per update")
    parser.add_argument("--steps", type=at_least(1), default=5)
    parser.add_argument("--updates", type=at_least(1), default=3)
    parser.add_argument("--model", default="models/emoji")
    parser.add_argument("--json", help="file to write the results to")
    args = parser.parse_args()
    if args.json:
        check_output(args.json)
    config = get_config("compressibility,full")
    config.update_from_flattened_dict({
        "model": args.model, "sample.images_per_epoch": args.images, "sample.num_steps": args.steps,
        "train.kl_weight": 0.0,
    })  # fmt: skip
    result = {"device": processor(), "commit": commit(), "torch": torch.__version__, "arguments": vars(args)}
    contestants = {name: Contestant(config, *kind) for name, kind in CONTESTANTS.items()}
    for name, function in (("gradients", gradients), ("updates", lambda c: updates(c, args.updates))):
        start = time.perf_counter()
        result[name] = function(contestants)
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(result[name], indent=1)}", flush=True)
        if args.json:
            with open(args.json, "w") as f:
                json.dump(result, f, indent=1)


if __name__ == "__main__":
    run_script(main)
