"""Rewards. Each is a function

    rewards, info = reward(images, prompts, metadata)

images: B PIL images; prompts: B strings; metadata: B dicts that came with the prompts. rewards: (B,) numbers, higher is
better; info: a dict of (B,) numbers to log by their mean. To add one: write the function, add its name to REWARDS.

A reward that needs a model is made by a function `load_NAME(model, device, options)` in MODEL_REWARDS, which returns
such a function. `model` is what follows the name: `pickscore` takes PickScore from the hub, `pickscore:FOLDER` from
that folder. `get_reward` reads a config's expression and mixes rewards with weights.

A reward that cannot score every prompt has a `check(prompt_set)`, which says so with an InputError at a run's start.
"""

import io
import os
import re
import threading
import traceback
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import CLIPConfig, CLIPProcessor

from config.base import get_config
from ddpo import geneval, ocr, reward_model, vlm
from ddpo.clip import DTYPES, cosine, embed_images, from_open_clip, load_clip, not_found
from ddpo.errors import InputError, choose, shorten
from ddpo.prompts import check_length


def jpeg_size(images):
    """(B,) sizes in kB (1000 bytes) of the images as JPEG of quality 95, Pillow's defaults otherwise (the paper)."""

    def size(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return buffer.tell() / 1000

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow encodes outside the interpreter lock
        return np.array(list(pool.map(size, images)), dtype=np.float32)


def jpeg_incompressibility(images, prompts, metadata):
    """Size as JPEG, in kB."""
    sizes = jpeg_size(images)
    return sizes, {"jpeg_kb": sizes}


def jpeg_compressibility(images, prompts, metadata):
    """Minus the size as JPEG, in kB."""
    sizes = jpeg_size(images)
    return -sizes, {"jpeg_kb": sizes}


def load_aesthetic(model, device, options):
    """The LAION aesthetic predictor: an affine function, in five layers, of the image's unit CLIP ViT-L/14 embedding.
    About 1 to 10. model: the head's file; default: from the hub."""
    repository, file = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
    try:
        state = torch.load(model or hf_hub_download(repository, file), map_location="cpu", weights_only=True)
    except Exception as error:  # missing, offline, damaged: every one has its own error
        raise not_found(model or repository, error) from error
    clip = load_clip(options.aesthetic_clip, device, options.precision)
    # The published files keep dropouts, which have no weights, in the numbering: layers 0, 2, 4, 6, 7.
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = torch.nn.ModuleDict({str(i): torch.nn.Linear(*size) for i, size in sizes.items()})
    try:
        layers.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    except RuntimeError as error:
        raise not_found(model or repository, error) from error
    width = clip[0].config.projection_dim
    if width != 768:
        raise InputError(
            f"reward_options.aesthetic_clip = {options.aesthetic_clip!r} has embeddings of {width} dimensions: the "
            "aesthetic head takes the 768 of openai/clip-vit-large-patch14"
        )
    layers.to(device).requires_grad_(False)

    def aesthetic(images, prompts, metadata):
        """The aesthetic score of each image, whatever its prompt."""
        values = embed_images(clip, images, options.batch_size)
        for layer in layers.values():
            values = layer(values)
        return values.squeeze(-1).cpu().numpy(), {}

    return aesthetic


def within_length(clip):
    """The `check` of a reward that reads prompts: its text encoder must not cut them."""
    return lambda prompt_set: check_length([prompt for prompt, _ in prompt_set], clip[1].tokenizer)


def load_clipscore(model, device, options):
    """CLIPScore (Hessel et al., arXiv 2104.08718): 2.5 max(cos, 0). Deviation: the prompt is not preceded by
    their "A photo depicts", since it may describe a drawing."""
    clip = load_clip(model or "openai/clip-vit-large-patch14", device, options.precision)

    def clipscore(images, prompts, metadata):
        """2.5 max(cos, 0) of image and prompt."""
        return 2.5 * cosine(clip, images, prompts, options.batch_size).clamp_min(0).numpy(), {}

    clipscore.check = within_length(clip)
    return clipscore


def load_pickscore(model, device, options):
    """PickScore (Kirstain et al., arXiv 2305.01569): exp(logit_scale) cos, about 15 to 25. Their processor is the
    base model's."""
    processor = "" if model else "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    clip = load_clip(model or "yuvalkirstain/PickScore_v1", device, options.precision, processor)

    def pickscore(images, prompts, metadata):
        """exp(logit_scale) cos of image and prompt."""
        scale = clip[0].logit_scale.float().exp().cpu()
        return (scale * cosine(clip, images, prompts, options.batch_size)).numpy(), {}

    pickscore.check = within_length(clip)
    return pickscore


def load_hpsv2(model, device, options):
    """HPSv2.1 (Wu et al., arXiv 2306.09341): the cosine, about 0.2 to 0.35. The published file is an open_clip
    checkpoint; it is read into transformers' CLIP, so neither open_clip nor their package is needed.

    model: a folder with HPS_v2.1_compressed.pt and, from laion/CLIP-ViT-H-14-laion2B-s32B-b79K, config.json and the
    processor's files; default: both from the hub.
    """
    base = model or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    file = "HPS_v2.1_compressed.pt"
    try:
        path = os.path.join(model, file) if model else hf_hub_download("xswu/HPSv2", file)
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = from_open_clip(state.get("state_dict", state), CLIPConfig.from_pretrained(base))
        processor = CLIPProcessor.from_pretrained(base)
    except Exception as error:  # missing, offline, damaged, another architecture
        raise not_found(model or "xswu/HPSv2", error) from error
    dtype = choose("reward_options.precision", options.precision, DTYPES)
    clip = network.to(device, dtype).eval().requires_grad_(False), processor

    def hpsv2(images, prompts, metadata):
        """The cosine of image and prompt."""
        return cosine(clip, images, prompts, options.batch_size).numpy(), {}

    hpsv2.check = within_length(clip)
    return hpsv2


def load_learned(model, device, options):
    """A reward model of your own: the folder that scripts.train_reward wrote."""
    return reward_model.load_reward_model(model, device, options.precision, options.batch_size)


REWARDS = {"jpeg_compressibility": jpeg_compressibility, "jpeg_incompressibility": jpeg_incompressibility}
MODEL_REWARDS = {
    "aesthetic": load_aesthetic,
    "clipscore": load_clipscore,
    "pickscore": load_pickscore,
    "hpsv2": load_hpsv2,
    "alignment": vlm.load_alignment,
    "counting": vlm.load_counting,
    "geneval": geneval.load_geneval,
    "ocr": ocr.load_ocr,
    "learned": load_learned,
}


def read_terms(expression):
    """(weight, term, name, model) of each term of a reward's expression. Raises InputError for a weight that is no
    finite number."""
    terms = []
    for text in re.split(r"\+|\s(?=-\s)", expression):
        sign, weight, term = re.fullmatch(r"\s*(-\s)?\s*(?:([^*:]*)\*)?(.*)", text, re.DOTALL).groups()
        name, _, model = term.strip().partition(":")
        try:
            number = float(weight or 1) * (-1 if sign else 1)
            if not np.isfinite(number):
                raise ValueError
        except ValueError as error:
            raise InputError(f"reward {expression!r}: the weight {weight.strip()!r} is not a number") from error
        terms.append((number, term.strip(), name, os.path.expanduser(model)))
    return terms


def reward_models(expression):
    """The models, by folder, file or hub name, that an expression names, and those under its learned rewards."""
    models = [(name, model) for _, _, name, model in read_terms(expression) if model and "://" not in model]
    encoders = [reward_model.encoder_of(model) for name, model in models if name == "learned"]
    return list(dict.fromkeys([*(model for _, model in models), *encoders]))


def get_reward(expression, device="cpu", options=None, prompt_set=()):
    """The reward function of an expression: NAME, NAME:MODEL, or a weighted sum of them, "pickscore +
    0.1*jpeg_compressibility". Every model is loaded here, once, so what is missing is known before any sampling.

    Args:
        expression: terms with + between them, or a minus that has spaces around it; each WEIGHT*NAME[:MODEL].
        device: where the models run.
        options: `config.reward_options`; default: those of config/base.py.
        prompt_set: the (prompt, metadata) pairs that it will have to score.
    Returns:
        a reward function. A sum also logs each of its terms, without its weight, under its own text.
    Raises:
        InputError for a name that is unknown, a weight that is no number, a model that cannot be loaded, or a prompt
        that one of the rewards cannot score.
    """
    options = get_config().reward_options if options is None else options
    terms = []
    for weight, term, name, model in read_terms(expression):
        reward = choose("reward", name, {**REWARDS, **MODEL_REWARDS})
        if model and name in REWARDS:
            raise InputError(f"reward {name} takes no model: {term!r}")
        try:
            if name in MODEL_REWARDS:
                reward = reward(model, device, options)
            if prompt_set and hasattr(reward, "check"):
                reward.check(prompt_set)
        except InputError as error:
            raise InputError(f"reward {term}: {error}") from error
        terms.append((weight, term, reward))
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][2]

    def mixed(images, prompts, metadata):
        """The weighted sum."""
        total, infos = 0, {}
        for weight, term, reward in terms:
            values, info = compute_rewards(reward, images, prompts, metadata)  # names the one that is to blame
            total = total + weight * values
            infos |= {term: values, **info}
        return total, infos

    def check(prompt_set):
        for _, _, reward in terms:
            if hasattr(reward, "check"):
                reward.check(prompt_set)

    mixed.__name__, mixed.check = expression, check
    return mixed


def raised_at(error):
    """ "at FILE:LINE" of the innermost code that is neither a library's nor this module's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    own = [f for f in frames if os.path.abspath(f.filename) != os.path.abspath(__file__)] or frames
    return f"at {os.path.relpath(own[-1].filename)}:{own[-1].lineno}"


def compute_rewards(reward, images, prompts, metadata, timeout=0):
    """Calls a reward and checks what it returns.

    Args:
        timeout: seconds after which a reward that has not returned is given up; 0: never.
    Returns:
        rewards (B,) float32 and info, a dict of (B,) arrays.
    Raises:
        InputError naming the reward, and the prompt where one is to blame, if the reward raises, hangs, or returns
        something else than B finite numbers and a dict.
    """
    name, count = getattr(reward, "__name__", str(reward)), len(images)
    outcome = []

    @torch.no_grad()  # gradient mode belongs to a thread
    def call():
        try:
            outcome.append(reward(images, prompts, metadata))
        except Exception as error:
            outcome.append(error)

    if timeout:
        thread = threading.Thread(target=call, name="reward", daemon=True)
        thread.start()
        thread.join(timeout)
    else:
        call()
    if not outcome:
        raise InputError(f"reward {name} gave no answer for {count} images within reward_timeout = {timeout:g} seconds")
    result = outcome[0]
    if isinstance(result, InputError):  # it says all there is to say
        raise result
    if isinstance(result, torch.OutOfMemoryError):
        raise InputError(
            f"reward {name} ran out of memory ({str(result).splitlines()[0]}): lower reward_options.batch_size or "
            "sample.batch_size, and resume"
        ) from result
    if isinstance(result, Exception):
        reason = f"{type(result).__name__}: {' '.join(str(result).split())}"
        raise InputError(
            f"reward {name} raised {reason}, {raised_at(result)} (first of its prompts: {shorten(prompts[0])})"
        ) from result
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise InputError(f"reward {name} must return a pair (rewards, info dict), not {type(result).__name__}")
    checked = {}
    for key, values in {"": result[0], **result[1]}.items():
        what = f"reward {name}" + (f", info {key!r}," if key else "")
        try:
            checked[key] = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{what} must return numbers: {error}") from error
        if checked[key].shape != (count,):
            raise InputError(f"{what} returned shape {checked[key].shape} for {count} images: it must be ({count},)")
        for prompt, value in zip(prompts, checked[key].tolist()):
            if not np.isfinite(value):
                raise InputError(f"{what} returned {value} for the prompt {shorten(prompt)}: it must be finite")
    return checked.pop(""), checked


class RewardQueue:
    """Scores the images of an epoch batch by batch, in the background while the next ones are sampled; on a CPU,
    whose cores are busy, at once. A failure is kept for `errors`."""

    def __init__(self, reward, prompts, metadata, timeout, device, clock):
        """prompts, metadata: of all N images. timeout: of a batch, see `compute_rewards`. clock: a Stopwatch."""
        self._reward, self._prompts, self._metadata, self._timeout = reward, prompts, metadata, timeout
        self._wait, self._clock = device.type == "cpu", clock
        self._thread, self._batches = ThreadPoolExecutor(1), []

    def put(self, first, images):
        """Takes the images from index `first` on."""
        batch = slice(first, first + len(images))
        arguments = self._reward, images, self._prompts[batch], self._metadata[batch], self._timeout
        self._batches.append(self._thread.submit(compute_rewards, *arguments))
        self._clock.lap("seconds_sampling")
        if self._wait:
            wait(self._batches)
            self._clock.lap("seconds_rewards")

    def failed(self):
        """Whether a reward has failed so far."""
        return any(batch.done() and batch.exception() for batch in self._batches)

    def cancel(self):
        """Drops the batches that are not being scored yet."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def errors(self):
        """The first failure, if any, once all are scored or one has failed; other exceptions than InputError are
        raised."""
        wait(self._batches, return_when=FIRST_EXCEPTION)
        self.cancel()
        for batch in self._batches:
            if batch.done() and not batch.cancelled() and batch.exception():
                if not isinstance(batch.exception(), InputError):
                    raise batch.exception()
                return [batch.exception()]
        return []

    def result(self):
        """rewards (N,) float32 and info, {name: (N,)}, in the order of the images."""
        scored = [batch.result() for batch in self._batches]
        rewards = np.concatenate([values for values, _ in scored])
        return rewards, {key: np.concatenate([info[key] for _, info in scored]) for key in scored[0][1]}
