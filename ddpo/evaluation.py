"""Looks at a policy on fixed prompts and noise: draws it, as a grid of images, and measures it, every few epochs of a
run (config.evaluate) and after it (`python -m scripts.evaluate`).

Prompts: those trained on and those held out. Sampling: with the sampler's noise, as in training, and without
("deterministic", noise level 0). Judges: the run's own reward, and others that it was not trained on, which is where
overoptimisation shows.
"""

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForImageClassification

from ddpo import prompts, rewards
from ddpo.clip import complete, embed_images, load_clip, not_found
from ddpo.errors import InputError
from ddpo.images import image_grid
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob

GRID = 2**31  # the "epoch" whose noise the image grids use
EVALUATION = GRID + 1  # the "epoch" whose noise is used, with seed 0 in every run: runs compare on the same noise


def split_prompts(prompt_set, held_out):
    """(pairs to train on, pairs held out): the latter those of a share `held_out` of the different prompts in a list of
    (prompt, metadata) pairs, chosen at random, but the same ones whatever the run's seed. Raises InputError if one of
    the two would be empty."""
    texts = list(dict.fromkeys(prompt for prompt, _ in prompt_set))
    count = round(held_out * len(texts))
    if held_out and not 0 < count < len(texts):
        left = "leaves none to train on" if count else "holds none out"
        raise InputError(f"held_out = {held_out:g} of {len(texts)} prompts {left}")
    chosen = {texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]}
    return [pair for pair in prompt_set if pair[0] not in chosen], [pair for pair in prompt_set if pair[0] in chosen]


def choose_prompts(pairs, limit, seen=()):
    """At most `limit` of some (prompt, metadata) pairs, always the same ones, in their order, each once, none of their
    prompts among the pairs `seen`. Pairs of one prompt that differ in their metadata are different pairs."""
    prompts_seen = {prompt for prompt, _ in seen}
    pairs = list({repr(pair): pair for pair in pairs if pair[0] not in prompts_seen}.values())
    return [pairs[i] for i in sorted(np.random.default_rng(0).permutation(len(pairs))[:limit].tolist())]


def load_classifier(folder):
    """An image classifier that takes images as they are, scaled to -1..1: models/emoji/classifier, or one made like
    it. Raises InputError if there is none."""
    try:
        return complete(
            AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        ).eval()
    except (OSError, ValueError) as error:
        raise not_found(folder, error) from error


@torch.no_grad()
def named_animals(images, classifier):
    """The label that the classifier gives each of B PIL images."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    labels = torch.cat([classifier(batch / 127.5 - 1).logits.argmax(1) for batch in pixels.split(64)])
    return [classifier.config.id2label[label] for label in labels.tolist()]


def diversity(embeddings, count):
    """Mean cosine distance between two of the `count` images of the same prompt, whose unit embeddings (count * P, D)
    are in the order of P prompts, `count` times. With s the sum over a prompt's images, the mean cosine is
    (|s|^2 - count) / (count^2 - count)."""
    sums = embeddings.reshape(count, -1, embeddings.shape[-1]).sum(0)
    return float(1 - ((sums**2).sum(-1) - count).mean() / (count**2 - count))


def score(images, pairs, judges, clip, classifier, timeout):
    """{name: (B,) values} of B images of B (prompt, metadata) pairs, and their "embedding" (B, D). Accuracy is nan
    where the prompt's last word, or the metadata's "animal", is none of the classifier's labels."""
    texts, metadata = map(list, zip(*pairs))
    values = {}
    for name, judge in judges.items():
        own, info = rewards.compute_rewards(judge, images, texts, metadata, timeout)
        values |= {name: own, **info}
    if clip:
        values["embedding"] = embed_images(clip, images).cpu().numpy()
    if classifier:
        animals, labels = [m.get("animal", text.split()[-1]) for text, m in pairs], classifier.config.label2id
        named = named_animals(images, classifier)
        right = [float(a == b) if a in labels else np.nan for a, b in zip(animals, named)]
        values["classifier_accuracy"] = np.array(right, dtype=np.float32)
    return values


def own_share(count, sharded):
    """(indices that this process draws of `count` images, how many of them are its own): the others are drawn in vain,
    since all processes take part in each pass of a sharded network."""
    state = PartialState()
    shares = np.array_split(np.arange(count), state.num_processes)
    own = shares[state.process_index].tolist()
    return own + [0] * (len(shares[0]) - len(own)) * bool(sharded), len(own)


def evaluate(policy, sets, count, judges, sample, clip=None, classifier=None, seed=0, timeout=0):
    """Draws `count` images of each prompt and measures them; the processes share the work.

    Args:
        policy: its scheduler set to sample.num_steps timesteps.
        sets: {"seen": (prompt, metadata) pairs, "held_out": pairs}.
        judges: {name: reward}, the run's own first, as "reward_mean".
        sample: a config's `sample`.
        clip: what `load_clip` returns, whose embeddings diversity is measured by. classifier: what `load_classifier`
            returns, which is to name the prompt's animal. Either may be missing.
        seed: of the noise.
        timeout: seconds that a judge may take for sample.batch_size images; 0: no limit.
    Returns:
        {"seen, stochastic": {name: mean, "diversity": ..., "by_prompt": {prompt: mean reward}}, ...} and {"seen,
        stochastic": PIL images of this process's first images, ...}.
    """
    shape, is_main = policy.noise_shape(sample), PartialState().is_main_process
    result, shown = {}, {}
    for sampling, noise_level in (("stochastic", policy.noise_level(sample)), ("deterministic", 0.0)):
        first = 0  # index of a set's first noise
        for kind, pairs in sets.items():
            drawn = pairs * count
            mine, own = own_share(len(drawn), policy.sharding)
            scored, pictures = [], []

            def judge(start, images):  # batch by batch, as in training
                part, images = [drawn[i] for i in mine[start : min(start + len(images), own)]], images[: own - start]
                if not part:
                    return
                scored.append(score(images, part, judges, clip, classifier, timeout))
                pictures.extend(images[: 8 - len(pictures)])

            if mine:
                sample_with_logprob(
                    policy, [drawn[i][0] for i in mine], lambda k: draw_noise(shape, seed, EVALUATION, first + mine[k]),
                    sample.guidance_scale, noise_level, sample.batch_size, on_images=judge,
                    progress=f"evaluation: {kind}, {sampling}" if is_main else None,
                )  # fmt: skip
            shown[f"{kind}, {sampling}"] = pictures
            first += len(drawn)
            parts = gather_object(scored)
            values = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            embeddings = values.pop("embedding", None)
            known = {key: value[~np.isnan(value)] for key, value in values.items()}
            measured = {key: float(value.mean()) for key, value in known.items() if len(value)}
            if embeddings is not None and count > 1:
                measured["diversity"] = diversity(embeddings, count)
            own, texts = values[next(iter(judges))], np.array([text for text, _ in drawn])
            measured["by_prompt"] = {text: float(own[texts == text].mean()) for text, _ in pairs}
            result[f"{kind}, {sampling}"] = measured
    return result, shown


def draw_grid(policy, prompt_set, count, sample, seed):
    """One image of `count` images, of prompts from all over the set, which the processes share. sample: a config's
    `sample`."""
    shape = policy.noise_shape(sample)
    texts = [prompt for prompt, _ in prompt_set[:: max(1, len(prompt_set) // count)]][:count]
    mine, own = own_share(len(texts), policy.sharding)
    images = mine and sample_with_logprob(
        policy, [texts[i] for i in mine], lambda k: draw_noise(shape, seed, GRID, mine[k]), sample.guidance_scale,
        policy.noise_level(sample), sample.batch_size, progress="grid" if PartialState().is_main_process else None,
    ).images  # fmt: skip
    return image_grid(gather_object(images[:own]), texts)


def load_evaluation(config, policy, reward_fn, trained_on, held_out):
    """A function without arguments that evaluates the policy as it is, by a run's config.evaluate; None if that is off.

    Args:
        reward_fn: the run's own reward, or None. trained_on, held_out: the run's (prompt, metadata) pairs.
    """
    options, device = config.evaluate, policy.device
    if not options.every:
        return None
    others = prompts.get_prompts(options.prompts) if options.prompts else held_out
    if options.prompts and not choose_prompts(others, 1, trained_on):
        raise InputError(f"evaluate.prompts = {options.prompts}: all of them are trained on")
    sets = {
        "seen": choose_prompts(trained_on, options.limit),
        "held_out": choose_prompts(others, options.limit, trained_on),
    }
    sets = {kind: pairs for kind, pairs in sets.items() if pairs}
    everything = [pair for pairs in sets.values() for pair in pairs]
    prompts.check_length([prompt for prompt, _ in everything], policy.pipe.tokenizer)
    names = [name.strip() for name in options.rewards.split(",") if name.strip()]
    getattr(reward_fn, "check", lambda pairs: None)(everything)
    judges = {"reward_mean": reward_fn} if reward_fn else {}
    judges |= {name: rewards.get_reward(name, device, config.reward_options, everything) for name in names}
    clip = load_clip(options.clip, device) if options.clip else None
    classifier = load_classifier(options.classifier) if options.classifier else None
    return lambda: evaluate(
        policy, sets, options.count, judges, config.sample, clip, classifier, timeout=config.reward_timeout
    )[0]
