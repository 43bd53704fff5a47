"""Rewards that ask a vision-language model about the picture: alignment with the prompt, and counting.

Where the model runs is decided by its name: `alignment:OWNER/NAME` or `alignment:FOLDER` loads it into this process
with transformers; `alignment:http://HOST:PORT/v1` asks any server that speaks OpenAI's chat completions (transformers
serve, vLLM, SGLang, llama.cpp, ...). Without a name it is the paper's LLaVA 13B. The server's key, if it wants one, is
the environment variable OPENAI_API_KEY.

Deviation from the paper: its server held LLaVA and BERTScore; here BERTScore runs beside the training.
"""

import base64
import functools
import http.client
import io
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ddpo.clip import DTYPES, not_found
from ddpo.errors import InputError, choose
from ddpo.prompts import english

DEFAULT_MODEL = "llava-hf/llava-1.5-13b-hf"
QUESTION = "Answer concisely: what is going on in this image?"
MAX_TOKENS = 64  # of an answer
ATTEMPTS = 4  # of one request; the pauses between them are 1, 2 and 4 s, and up to as much again
FAILURES = (OSError, http.client.HTTPException)  # of a request: nobody there, too late, HTTP status, not even HTTP


def as_jpeg(image):
    """The bytes of a PIL image as JPEG of quality 80: what the model sees (the paper)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------- two backends
@functools.lru_cache(maxsize=2)  # alignment and counting may share a model
def load_vlm(model, device="cpu", precision="fp32", batch_size=32, vlm_name="", timeout=60.0, concurrency=16):
    """A function ask(images, questions) -> answers, of B PIL images, B strings and B strings, greedily decoded.

    Args:
        model: http:// or https:// address of a server (up to /v1); else hub name or folder. Empty: LLaVA 13B.
        vlm_name: the model's name at the server; empty: the first that it lists.
        timeout: seconds that one request may take.
        concurrency: requests at a time.
    Raises:
        InputError if there is no such model or server. `ask` raises one that names the picture that failed.
    """
    if model.startswith(("http://", "https://")):
        address = model.rstrip("/")
        listed = list_models(address, timeout)
        if not (vlm_name or listed):
            raise InputError(
                f"{address} lists no model: is that its address up to /v1? If so, name one with "
                "--config.reward_options.vlm_name"
            )
        vlm_name = vlm_name or listed[0]
        return functools.partial(ask_server, address, vlm_name, timeout, concurrency)
    dtype = choose("reward_options.precision", precision, DTYPES)
    try:
        network = AutoModelForImageTextToText.from_pretrained(model or DEFAULT_MODEL, dtype=dtype).to(device).eval()
        processor = AutoProcessor.from_pretrained(model or DEFAULT_MODEL)
    except Exception as error:  # missing files, foreign formats: every loader has its own error
        raise not_found(model or DEFAULT_MODEL, error) from error
    if not getattr(processor, "chat_template", None):
        raise InputError(f"{model or DEFAULT_MODEL} has no chat template: it does not answer questions")
    processor.tokenizer.padding_side = "left"  # an answer continues its question
    return functools.partial(ask_network, network, processor, batch_size)


@torch.no_grad()
def ask_network(network, processor, batch_size, images, questions):
    """The answers of a model in this process."""
    answers = []
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        chats = [
            [{"role": "user", "content": [
                {"type": "image", "image": Image.open(io.BytesIO(as_jpeg(image)))}, {"type": "text", "text": question},
            ]}]
            for image, question in zip(images[batch], questions[batch])
        ]  # fmt: skip
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(network.device, network.dtype)  # fmt: skip
        output = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers += processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def ask_server(address, model, timeout, concurrency, images, questions):
    """The answers of an OpenAI-compatible server: JSON with the picture as a data URL."""

    def ask(i):
        picture = f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(images[i])).decode()}"
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": questions[i]}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS,
                "temperature": 0, "stream": False}  # fmt: skip
        try:
            answer = request_json(f"{address}/chat/completions", body, timeout)
            return answer["choices"][0]["message"]["content"].strip()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"{address} answered picture {i} with no message: {str(answer)[:200]}") from error
        except FAILURES as error:
            raise InputError(
                f"{address} failed on picture {i} of {len(images)} ({questions[i]!r}) after {ATTEMPTS} "
                f"attempts at most: {describe(error)}"
            ) from error

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask, i) for i in range(len(images))]
        try:
            return [future.result() for future in futures]
        except InputError:
            pool.shutdown(cancel_futures=True)  # the rest need not be tried
            raise


def list_models(address, timeout):
    """The names of a server's models; also the proof, before any sampling, that it is there and takes the key."""
    try:
        return [model["id"] for model in request_json(f"{address}/models", None, timeout, attempts=1)["data"]]
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 500, 501):  # it is there, but does not list
            return []
        raise InputError(f"{address} refuses: {describe(error)}. Its key goes in OPENAI_API_KEY") from error
    except FAILURES as error:
        raise InputError(f"no server at {address} ({describe(error)}). Give its address up to /v1") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{address}/models does not list models as OpenAI's interface does") from error


def request_json(url, body, timeout, attempts=ATTEMPTS):
    """POSTs `body` as JSON (None: GETs) and returns the answer's JSON. Connections that fail, overload (429) and the
    server's own errors (5xx) are tried again after a pause that doubles. Raises one of FAILURES."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY'].strip()}"
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(1, attempts + 1):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
                answer = response.read()
            break
        except FAILURES as error:  # refused, timed out, HTTP status
            status = getattr(error, "code", None)
            if attempt == attempts or (status is not None and status != 429 and status < 500):
                raise
            time.sleep(2 ** (attempt - 1) * (1 + random.random()))
    try:
        return json.loads(answer)
    except ValueError as error:
        raise OSError(f"the answer is not JSON: {error}") from error


def describe(error):
    """One line of what a request died of, with what the server said."""
    said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
    return " ".join(f"{type(error).__name__}: {error} {said}".split())[:300]


# -------------------------------------------------------------------------------------------------------- the rewards
def load_asked(model, device, options):
    """`load_vlm` with the `config.reward_options`."""
    return load_vlm(model, device, options.precision, options.batch_size, options.vlm_name, options.timeout,
                    options.concurrency)  # fmt: skip


def load_alignment(model, device, options):
    """The paper's alignment: BERTScore recall of "The image contains {prompt}" in the model's description."""
    ask = load_asked(model, device, options)
    name = options.bertscore_model
    try:
        network, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise not_found(name, error) from error
    if not 0 < options.bertscore_layer <= network.config.num_hidden_layers:
        raise InputError(
            f"reward_options.bertscore_layer = {options.bertscore_layer}: {name} has {network.config.num_hidden_layers}"
        )
    network.to(device, choose("reward_options.precision", options.precision, DTYPES))

    def alignment(images, prompts, metadata):
        """Share of the prompt's tokens, by embedding, that the description contains."""
        descriptions = ask(images, [QUESTION] * len(images))
        contents = [f"The image contains {prompt}" for prompt in prompts]
        return bertscore_recall(network, tokenizer, options.bertscore_layer, descriptions, contents), {}

    return alignment


def bertscore_recall(network, tokenizer, layer, candidates, references):
    """(B,) BERTScore recall (Zhang et al., arXiv 1904.09675): the mean over a reference's tokens of the largest cosine
    with a token of the candidate, in the output of one layer. An empty candidate recalls nothing."""
    from torchmetrics.functional.text import bert_score  # slow to import

    def forward(network, batch):
        return network(**batch, output_hidden_states=True).hidden_states[layer].float()

    # One pair at a time: torchmetrics 1.9.0 sorts a batch by length and puts it back in the wrong order, so that
    # sentences are scored against others' references.
    recalls = [
        bert_score(
            [candidate], [reference], model=network, user_tokenizer=tokenizer, user_forward_fn=forward,
            device=network.device, truncation=True,
        )["recall"] if candidate else 0.0
        for candidate, reference in zip(candidates, references)
    ]  # fmt: skip
    return np.array([float(recall) for recall in recalls], dtype=np.float32)


def load_counting(model, device, options):
    """The share of the prompt set's own questions that the model answers right."""
    ask = load_asked(model, device, options)

    def check(prompt_set):
        for prompt, entry in prompt_set:
            if not entry.get("questions"):
                raise InputError(f"it needs prompts with questions, like the set counting; not {prompt!r}")

    def counting(images, prompts, metadata):
        """Share of metadata["questions"] whose answer contains what metadata["answers"] says."""
        asked = [(image, q, a) for image, m in zip(images, metadata) for q, a in zip(m["questions"], m["answers"])]
        said = ask([image for image, _, _ in asked], [question for _, question, _ in asked])
        right = iter([is_right(answer, expected) for answer, (_, _, expected) in zip(said, asked)])
        return np.array([np.mean([next(right) for _ in m["questions"]]) for m in metadata], dtype=np.float32), {}

    counting.check = check
    return counting


@functools.cache
def number_words():
    """{"zero": "0", ... "ninety-nine": "99"}."""
    return {english().number_to_words(n): str(n) for n in range(100)}


def is_right(answer, expected):
    """Whether an answer contains the expected word, as a word of its own: "cat" is not in "cattle". The plural will do,
    and digits for a number; a number beside others ("two or three") will not."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)?|\d+", answer.lower())
    known = number_words()
    if expected in known:
        return {known.get(word, word) for word in words if word in known or word.isdigit()} == {known[expected]}
    return expected in words or english().plural_noun(expected) in words
