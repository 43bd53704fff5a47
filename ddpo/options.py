"""A run's options: presets, which values can work, and which of them a resumed run may change."""

import hashlib
import json
import math
import os
import runpy
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from config.base import get_config
from ddpo.batches import samples_together
from ddpo.errors import InputError, choose, one_line
from ddpo.losses import ALGORITHMS

# What may differ in a resumed run without changing what is computed (memory knobs: beyond rounding).
NO_EFFECT = (
    "run_dir", "resume", "num_epochs", "tracker", "save_every", "keep_checkpoints", "grid_every",
    "grid_images", "threads", "reward_timeout", "compile", "sample.batch_size", "train.batch_size",
    "train.gradient_checkpointing", "reward_options.batch_size", "reward_options.timeout", "reward_options.concurrency",
    *(f"evaluate.{key}" for key in ("every", "rewards", "prompts", "limit", "count", "clip", "classifier")),
)  # fmt: skip
LONGEST = 1e6  # seconds that a timeout may be: clocks overflow at a few hundred years


def load_preset(preset):
    """The config of FILE[:VARIANT], as --config takes it."""
    path, _, variant = preset.partition(":")
    try:
        return runpy.run_path(path)["get_config"](*filter(None, [variant]))
    except Exception as error:  # the file's, or the preset's own
        raise InputError(f"no preset can be loaded from {preset!r}: {one_line(error)}") from error


def expand_home(config):
    """Replaces a leading ~ in every option that is a text: a shell does not, behind --config.KEY=."""
    texts = {key: value for key, value in flatten(config).items() if isinstance(value, str)}
    config.update_from_flattened_dict({key: os.path.expanduser(value) for key, value in texts.items()})


def flatten(config, prefix=""):
    """{dotted name: value} of all leaves of a ConfigDict or nested dict."""
    leaves = {}
    for key, value in config.items():
        leaves |= flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return leaves


def read_options(run_dir):
    """{dotted name: value} of a run's config.json. A run older than an option has had its default."""
    with open(os.path.join(run_dir, "config.json")) as f:
        return flatten(get_config()) | flatten(json.load(f))


def record_options(run_dir, config):
    """Writes a run's config.json; on a resume, says first which options are others than before."""
    path, new = os.path.join(run_dir, "config.json"), flatten(config)
    if os.path.exists(path):
        old = read_options(run_dir)
        for key in sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
            if key not in ("run_dir", "resume", "num_epochs"):
                matters = "no result" if key in NO_EFFECT else "the result: the run is no longer one of either value"
                print(f"{run_dir}: {key} was {old.get(key)!r}, now {new.get(key)!r} (changes {matters})", flush=True)
    with open(path + ".tmp", "w") as f:
        json.dump(config.to_dict(), f, indent=2)
    os.replace(path + ".tmp", path)


def content_hash(name):
    """A hash of a model's files, by folder or file; the revision, if it is a hub name; "" if it is neither."""
    if not os.path.exists(name):
        found = "/" in name and name.count("/") == 1 and [
            try_to_load_from_cache(name, file) for file in ("model_index.json", "config.json")
        ]  # fmt: skip
        return next((Path(path).parent.name for path in found or () if isinstance(path, str)), "")
    endings = (".safetensors", ".bin", ".pt", ".pth", ".json", ".txt")
    files = sorted(path for path in Path(name).rglob("*") if path.suffix in endings and path.is_file())
    digest = hashlib.sha256()
    for path in files if os.path.isdir(name) else [Path(name)]:
        with open(path, "rb") as f:
            digest.update(f"{path.relative_to(name)}\0".encode() + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def record_inputs(run_dir, prompt_set, model, reward_models):
    """Writes RUN/inputs.json: hashes of what a run reads beside its options. On a resume, says first which of them are
    others than before. prompt_set: (prompt, metadata) pairs; model, reward_models: folders, files or hub names."""
    text = json.dumps(prompt_set, sort_keys=True, default=str)
    new = {
        "the prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        f"the base model {model}": content_hash(model),
    }
    new |= {f"the reward model {name}": content_hash(name) for name in reward_models}
    path = os.path.join(run_dir, "inputs.json")
    if os.path.exists(path):
        with open(path) as f:
            old = json.load(f)
        for what in (key for key in new if old.get(key, new[key]) != new[key]):
            print(f"{run_dir}: {what} changed since the run began (changes the result: the run is no longer one of "
                  "either)", flush=True)  # fmt: skip
    with open(path + ".tmp", "w") as f:
        json.dump(new, f, indent=2)
    os.replace(path + ".tmp", path)


def check(config, processes=1):
    """Raises InputError if the numbers of a config cannot work. Names are checked where they are looked up."""
    sample, train = config.sample, config.train
    for name, value, lowest in (
        ("num_epochs", config.num_epochs, 1), ("seed", config.seed, 0),
        ("lora_rank", config.lora_rank, 0), ("save_every", config.save_every, 1),
        ("keep_checkpoints", config.keep_checkpoints, 0), ("grid_every", config.grid_every, 0),
        ("grid_images", config.grid_images, 1), ("threads", config.threads, 0),
        ("sample.images_per_epoch", sample.images_per_epoch, 1), ("sample.batch_size", sample.batch_size, 0),
        ("sample.images_per_prompt", sample.images_per_prompt, 1), ("sample.num_steps", sample.num_steps, 1),
        ("sample.height", sample.height, 0), ("sample.width", sample.width, 0),
        ("stats.buffer_size", config.stats.buffer_size, 1), ("stats.min_count", config.stats.min_count, 1),
        ("stats.max_age", config.stats.max_age, 0), ("train.updates_per_epoch", train.updates_per_epoch, 1),
        ("train.inner_epochs", train.inner_epochs, 1), ("train.batch_size", train.batch_size, 0),
        ("train.warmup_updates", train.warmup_updates, 0), ("train.draws", train.draws, 1),
        ("evaluate.every", config.evaluate.every, 0), ("evaluate.limit", config.evaluate.limit, 1),
        ("evaluate.count", config.evaluate.count, 2 if config.evaluate.clip else 1),
        ("reward_options.batch_size", config.reward_options.batch_size, 1),
        ("reward_options.concurrency", config.reward_options.concurrency, 1),
    ):  # fmt: skip
        if value < lowest:
            raise InputError(f"{name} = {value} must be at least {lowest}")
    if config.seed >= 2**64:
        raise InputError(f"seed = {config.seed} must be below 2^64")
    for name, value, highest in (
        ("stats.shrinkage", config.stats.shrinkage, math.inf),
        ("train.inverse_temperature", train.inverse_temperature, math.inf),
        ("train.kl_weight", train.kl_weight, math.inf), ("train.target_kl", train.target_kl, math.inf),
        ("train.anchor_weight", train.anchor_weight, math.inf),
        ("train.reference_weight", train.reference_weight, math.inf),
        ("train.keep_percentile", train.keep_percentile, 100),
        ("train.prompt_dropout", train.prompt_dropout, 1), ("train.ema_decay", train.ema_decay, 1),
        ("train.adam_weight_decay", train.adam_weight_decay, math.inf),
        ("train.adam_epsilon", train.adam_epsilon, math.inf),
        ("held_out", config.held_out, 1), ("held_out_choices", config.held_out_choices, 1),
        ("reward_options.max_unusable", config.reward_options.max_unusable, 1),
    ):  # fmt: skip
        if not 0 <= value <= highest or value == math.inf:
            limit = f", at most {highest}" if highest < math.inf else " and finite"
            raise InputError(f"{name} = {value} must be at least 0{limit}")
    updates = train.updates_per_epoch * train.inner_epochs
    if config.algorithm == "ddpo_sf" and updates > 1:
        raise InputError(
            f"ddpo_sf makes one update an epoch, not {updates}: its gradient holds only at the weights that sampled. "
            "Use train.updates_per_epoch=1 and train.inner_epochs=1, or ddpo_is"
        )
    algorithm = choose("algorithm", config.algorithm, ALGORITHMS)
    if train.target_kl and "old" not in algorithm.needs:
        raise InputError(
            f"train.target_kl = {train.target_kl}: {config.algorithm} does not know the policy that sampled: use 0"
        )
    for name, compares in (
        (f"advantage {config.advantage}", config.advantage in ("per_group", "leave_one_out")),
        (f"algorithm {config.algorithm}", config.algorithm in ("dpo", "best_of_n")),
    ):
        if compares and sample.images_per_prompt == 1:
            raise InputError(f"{name} compares images of one prompt: set sample.images_per_prompt to 2 or more")
    if algorithm.process == "one step":
        if sample.num_steps != 1:
            raise InputError(
                f"{config.algorithm} trains generators that take one step, not sample.num_steps = {sample.num_steps}: "
                "set it to 1, with a model made for that (config/turbo.py)"
            )
        if sample.eta:
            raise InputError(f"sample.eta = {sample.eta} must be 0: {config.algorithm} trains deterministic DDIM steps")
        if sample.images_per_prompt < 4:
            raise InputError(
                f"sample.images_per_prompt = {sample.images_per_prompt}: {config.algorithm} compares the better half "
                "of a prompt's images with the worse half, so at least 4"
            )
    if sample.averaged and (algorithm.process != "forward" or not train.ema_decay):
        why = "there is none: set train.ema_decay, say to 0.9"
        if algorithm.process != "forward":
            why = f"{config.algorithm} compares what was sampled with the weights being trained: use False"
        raise InputError(f"sample.averaged = True samples by the moving average of the weights, and {why}")
    for name in ("learning_rate", "clip_range", "kl_range", "advantage_clip", "max_grad_norm", "timestep_fraction",
                 "nft_beta", "ram_scale", "dpo_beta"):  # fmt: skip
        if not train[name] > 0:
            raise InputError(f"train.{name} = {train[name]} must be greater than 0")
    if train.learning_rate == math.inf:
        raise InputError("train.learning_rate = inf must be a finite number")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= train[name] < 1:
            raise InputError(f"train.{name} = {train[name]} must be at least 0 and less than 1")
    if not 0 < config.reward_options.timeout <= LONGEST:
        raise InputError(
            f"reward_options.timeout = {config.reward_options.timeout} must be greater than 0, at most {LONGEST:g}"
        )
    if not 0 <= config.reward_timeout <= LONGEST:
        raise InputError(
            f"reward_timeout = {config.reward_timeout} must be at least 0 (0: no limit), at most {LONGEST:g}"
        )
    if not 0 <= sample.eta <= 1 or (sample.eta == 0 and algorithm.process == "reverse"):
        raise InputError(
            f"sample.eta = {sample.eta}: {config.algorithm} needs 0 < eta <= 1, since a deterministic step has no "
            "likelihood"
            if algorithm.process == "reverse"
            else f"sample.eta = {sample.eta} must be from 0 to 1"
        )
    if not 0 <= sample.noise_level < math.inf or (sample.noise_level == 0 and algorithm.process == "reverse"):
        raise InputError(
            f"sample.noise_level = {sample.noise_level} must be greater than 0 and finite: {config.algorithm} needs "
            "steps that have a likelihood"
            if algorithm.process == "reverse"
            else f"sample.noise_level = {sample.noise_level} must be at least 0 and finite"
        )
    if not 0 <= sample.shift < math.inf:
        raise InputError(f"sample.shift = {sample.shift} must be at least 0 (0: the model's own) and finite")
    if not 1 <= sample.guidance_scale < math.inf:
        raise InputError(f"sample.guidance_scale = {sample.guidance_scale} must be at least 1 (no guidance) and finite")
    too_few = algorithm.process == "reverse" and not round(train.timestep_fraction * sample.num_steps)
    if train.timestep_fraction > 1 or too_few:
        raise InputError(
            f"train.timestep_fraction = {train.timestep_fraction} of sample.num_steps = {sample.num_steps} must leave "
            f"1 to {sample.num_steps} steps: use {1 / sample.num_steps:.3g} to 1"
        )
    if config.stats.min_count > config.stats.buffer_size:
        raise InputError(
            f"stats.min_count = {config.stats.min_count} can never be reached by stats.buffer_size = "
            f"{config.stats.buffer_size} rewards: lower the one or raise the other"
        )
    if config.tracker not in ("", "wandb", "tensorboard"):
        raise InputError(f'unknown tracker {config.tracker!r}: "" (none), wandb or tensorboard')
    parts = math.lcm(train.updates_per_epoch * processes, sample.images_per_prompt)
    if samples_together(config, algorithm) > 1:  # compared with one another: they belong to one update and one process
        parts = train.updates_per_epoch * processes * sample.images_per_prompt
    if sample.images_per_epoch % parts:
        below, above = sample.images_per_epoch // parts * parts, (sample.images_per_epoch // parts + 1) * parts
        raise InputError(
            f"sample.images_per_epoch = {sample.images_per_epoch} does not split into train.updates_per_epoch = "
            f"{train.updates_per_epoch} x {processes} process(es) and groups of sample.images_per_prompt = "
            f"{sample.images_per_prompt}: use {f'{below} or {above}' if below else above}"
        )
