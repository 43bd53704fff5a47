"""Rewards that ask a vision-language model about the picture: alignment with the prompt, and counting.

Where the model runs is decided by its name: `alignment:OWNER/NAME` or `alignment:FOLDER` loads it into this process
with transformers; `alignment:http://HOST:PORT/v1` asks any server that speaks OpenAI's chat completions (transformers
serve, vLLM, SGLang, llama.cpp, ...). Without a name it is the paper's LLaVA 13B. The server's key, if it wants one, is
the environment variable OPENAI_API_KEY; it is sent to that address alone, since redirects are refused.

An answer that is empty, refused, filtered or cut off is unusable, which is not the same as wrong: its image gets the
mean reward of the others in its batch, so that it teaches nothing, and `vlm_unusable` logs the share of such images.

Deviation from the paper: its server held LLaVA and BERTScore; here BERTScore runs beside the training.
"""

import asyncio
import base64
import functools
import io
import json
import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
import numpy as np
import openai
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ddpo.clip import DTYPES, complete, not_found
from ddpo.errors import InputError, choose, shorten
from ddpo.prompts import english

DEFAULT_MODEL = "llava-hf/llava-1.5-13b-hf"
QUESTION = "Answer concisely: what is going on in this image?"
MAX_TOKENS = 256  # of an answer
ATTEMPTS = 6  # of one request; the pauses between them double from half a second to eight, or are as Retry-After says


class Answer(NamedTuple):
    text: str
    problem: str = ""  # why it cannot be used: "empty", "refused", "filtered" or "cut off"


def read_answer(text, reason="stop", refusal=None):
    """The Answer in what a model said, without a reasoning model's thoughts. reason: why it stopped, as OpenAI's
    interface names it."""
    text = re.sub(r"<think>.*?(</think>|$)", "", text or "", flags=re.DOTALL).strip()
    if refusal:
        return Answer(refusal, "refused")
    problem = {"content_filter": "filtered", "length": "cut off"}.get(reason, "" if text else "empty")
    return Answer(text, problem)


def as_jpeg(image):
    """The bytes of a PIL image as JPEG of quality 80: what the model sees (the paper)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------- two backends
@functools.lru_cache(maxsize=2)  # alignment and counting may share a model
def load_vlm(model, device="cpu", precision="fp32", batch_size=32, vlm_name="", timeout=60.0, concurrency=16):
    """A function ask(images, questions) -> B Answers, greedily decoded, about B PIL images, a question each.

    Args:
        model: http:// or https:// address of a server (up to /v1); else hub name or folder. Empty: LLaVA 13B.
        vlm_name: the model's name at the server; empty: the first that it lists.
        timeout: seconds that one request may take in all.
        concurrency: requests at a time.
    Raises:
        InputError if there is no such model or server. `ask` raises one that names the image that failed.
    """
    if model.startswith(("http://", "https://")):
        address = model.rstrip("/")
        try:
            parts = urlsplit(address)
            if not parts.hostname or " " in address or parts.port == 0:
                raise ValueError("it names no host, or port 0, or has a blank")
        except ValueError as error:
            raise InputError(f"{address!r} is not an address like http://127.0.0.1:8000/v1: {error}") from error
        listed = asyncio.run(list_models(address, timeout))
        if not (vlm_name or listed):
            raise InputError(
                f"{address} lists no model: is that its address up to /v1? If so, name one with "
                "--config.reward_options.vlm_name"
            )
        vlm_name = vlm_name or listed[0]
        return lambda images, questions: asyncio.run(
            ask_server(address, vlm_name, timeout, concurrency, images, questions)
        )
    dtype = choose("reward_options.precision", precision, DTYPES)
    try:
        network = complete(
            AutoModelForImageTextToText.from_pretrained(model or DEFAULT_MODEL, dtype=dtype, output_loading_info=True)
        )
        network.to(device).eval()
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
        output = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[
            :, inputs["input_ids"].shape[1] :
        ]
        ends = torch.as_tensor(network.generation_config.eos_token_id, device=output.device).flatten()
        for text, ended in zip(
            processor.tokenizer.batch_decode(output, skip_special_tokens=True), torch.isin(output, ends).any(1).tolist()
        ):
            answers.append(read_answer(text, "stop" if ended else "length"))
    return answers


class WholeAnswers(httpx2.AsyncHTTPTransport):
    """Gives a request and all of its answer `timeout` seconds, where httpx's own restarts at each read; and turns an
    answer that is not JSON into a server's error, which the client tries again."""

    def __init__(self, timeout):
        super().__init__()
        self.timeout = timeout

    async def handle_async_request(self, request):
        try:
            async with asyncio.timeout(self.timeout):
                response = await super().handle_async_request(request)
                body = await response.aread()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(f"no answer within {self.timeout:g} s", request=request) from error
        try:
            if response.status_code == 200:
                json.loads(body)
        except ValueError:
            return httpx2.Response(502, text=f"the answer is not JSON: {body[:200].decode(errors='replace')}")
        return response


def open_client(address, timeout, attempts):
    """OpenAI's client for a server, to be used in an `async with`."""
    http = openai.DefaultAsyncHttpxClient(transport=WholeAnswers(timeout), timeout=timeout, follow_redirects=False)
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    return openai.AsyncOpenAI(base_url=address, api_key=key, http_client=http, max_retries=attempts - 1)


async def ask_server(address, model, timeout, concurrency, images, questions):
    """The answers of an OpenAI-compatible server: JSON with the image as a data URL."""
    free = asyncio.Semaphore(concurrency)

    async def ask(i):
        try:
            async with free:
                picture = f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(images[i])).decode()}"
                content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": questions[i]}]
                chat = [{"role": "user", "content": content}]
                answer = await client.chat.completions.create(
                    model=model, messages=chat, max_tokens=MAX_TOKENS, temperature=0, stream=False
                )
        except openai.OpenAIError as error:
            raise InputError(
                f"{address} failed on image {i} of {len(images)} ({shorten(questions[i])}) after {ATTEMPTS} "
                f"attempts at most: {describe(error)}"
            ) from error
        try:
            choice = answer.choices[0]
            return read_answer(choice.message.content, choice.finish_reason, choice.message.refusal)
        except (IndexError, TypeError, AttributeError) as error:
            raise InputError(f"{address} answered image {i} with no message: {one_line(answer)}") from error

    async with open_client(address, timeout, ATTEMPTS) as client:
        tasks = [asyncio.create_task(ask(i)) for i in range(len(images))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one has failed, the rest need not be tried
                task.cancel()


async def list_models(address, timeout):
    """The names of a server's models; also the proof, before any sampling, that it is there and takes the key."""
    try:
        async with open_client(address, timeout, attempts=1) as client:
            return [model.id for model in (await client.models.list()).data]
    except openai.APIStatusError as error:
        if error.status_code in (404, 405, 500, 501):  # it is there, but does not list
            return []
        raise InputError(f"{address} refuses: {describe(error)}. Its key goes in OPENAI_API_KEY") from error
    except openai.OpenAIError as error:
        raise InputError(f"no server at {address} ({describe(error)}). Give its address up to /v1") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"{address}/models does not list models as OpenAI's interface does") from error


def describe(error):
    """One line of what a request died of, with what the server said, and without the key."""
    if isinstance(error, openai.APIStatusError):
        response = error.response
        said = f"redirect to {response.headers.get('location')}, refused" if response.is_redirect else response.text
        return one_line(f"HTTP {error.status_code}: {said}")
    return one_line(f"{error} {error.__cause__ or ''}")


def one_line(text):
    """What a server said as one line of at most 300 characters, without the key."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    line = " ".join(str(text).split())
    return (line.replace(key, "***") if key else line)[:300]


# -------------------------------------------------------------------------------------------------------- the rewards
def load_asked(model, device, options):
    """`load_vlm` with the `config.reward_options`."""
    return load_vlm(model, device, options.precision, options.batch_size, options.vlm_name, options.timeout,
                    options.concurrency)  # fmt: skip


def load_alignment(model, device, options):
    """The paper's alignment: BERTScore recall of "The image contains {prompt}" in the model's description."""
    ask, name = load_asked(model, device, options), options.bertscore_model
    try:
        network = complete(AutoModel.from_pretrained(name, output_loading_info=True))
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise not_found(name, error) from error
    if not 0 < options.bertscore_layer <= network.config.num_hidden_layers:
        raise InputError(
            f"reward_options.bertscore_layer = {options.bertscore_layer}: {name} has {network.config.num_hidden_layers}"
        )
    network.to(device, choose("reward_options.precision", options.precision, DTYPES))

    def alignment(images, prompts, metadata):
        """Share of the prompt's tokens, by embedding, that the description contains."""
        answers = ask(images, [QUESTION] * len(images))
        usable = check_usable([[answer] for answer in answers], options.max_unusable)
        contents = [f"The image contains {prompt}" for prompt, use in zip(prompts, usable) if use]
        descriptions = [answer.text for answer, use in zip(answers, usable) if use]
        recalls = bertscore_recall(network, tokenizer, options.bertscore_layer, descriptions, contents)
        return fill(recalls, usable), {"vlm_unusable": ~usable}

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
                raise InputError(f"it needs prompts with questions, like the set counting; not {shorten(prompt)}")

    def counting(images, prompts, metadata):
        """Share of metadata["questions"] whose answer says what metadata["answers"] says."""
        asked = [(image, question) for image, m in zip(images, metadata) for question in m["questions"]]
        said = iter(ask(*map(list, zip(*asked))))
        answers = [[next(said) for _ in m["questions"]] for m in metadata]
        usable = check_usable(answers, options.max_unusable)
        shares = [
            np.mean([is_right(a.text, e, q) for a, e, q in zip(own, m["answers"], m["questions"])])
            for own, m, use in zip(answers, metadata, usable)
            if use
        ]
        return fill(shares, usable), {"vlm_unusable": ~usable}

    counting.check = check
    return counting


def check_usable(answers, max_unusable):
    """(B,) bool: whether all answers about an image can be used. answers: B lists of Answers. Raises InputError if
    more than a share `max_unusable` of the images, or every one, has an answer that cannot."""
    usable = np.array([not any(answer.problem for answer in own) for own in answers])
    if not usable.any() or np.mean(~usable) > max_unusable:
        example = next(answer for own in answers for answer in own if answer.problem)
        raise InputError(
            f"the vision-language model gave no usable answer for {np.sum(~usable)} of {len(usable)} images "
            f"(reward_options.max_unusable = {max_unusable:g}); the first was {example.problem}: "
            f"{shorten(example.text)}"
        )
    return usable


def fill(values, usable):
    """(B,) float32 of the values of the usable images, their mean standing in for the others'."""
    filled = np.full(len(usable), np.mean(values), dtype=np.float32)
    filled[usable] = values
    return filled


@functools.cache
def number_words():
    """{"zero": 0, ... "ninety-nine": 99, "no": 0, "pair": 2, ...}, and digits as text."""
    words = {english().number_to_words(n): n for n in range(100)} | {str(n): n for n in range(100)}
    return words | {"no": 0, "none": 0, "single": 1, "pair": 2, "couple": 2, "trio": 3, "dozen": 12}


NEGATIONS = {"no", "not", "never", "without", "neither", "nor", "zero", "cannot"}


def is_right(answer, expected, question=""):
    """Whether an answer says the expected word: a number, or a thing in singular or plural. "No cat" does not say
    "cat", nor "not three" or "two or three" three. Of several numbers the one before the question's noun counts, else
    the first."""
    words = words_of(answer)
    if expected in number_words():
        return count_in(words, question.lower()) == number_words()[expected]
    return bool(affirmed(words, {expected, english().plural_noun(expected)}))


def words_of(answer):
    """The words, numbers and stops of an answer, in lower case: "2-3 cats" as 2 to 3 cats, "isn't" as is not."""
    answer = re.sub(r"(\d)\s*[-–]\s*(\d)", r"\1 to \2", answer.lower().replace("n't", " not"))
    return re.findall(r"[a-z]+(?:-[a-z]+)*|\d+|[,.;]", answer)


def affirmed(words, names):
    """Which of the names an answer's words say, in their order, without those that it denies."""
    return [w for i, w in enumerate(words) if w in names and not NEGATIONS & set(words[max(0, i - 3) : i])]


def count_in(words, question):
    """The number that an answer's words give for what the question counts, or None if they leave it open."""
    numbers = number_words()
    places = [i for i, word in enumerate(words) if word in numbers]
    noun = re.search(r"how many ((?:[a-z-]+ )*?[a-z-]+) (?:are|is|can|do)\b", question)
    names = {noun[1], english().singular_noun(noun[1]) or noun[1]} if noun else set()
    before_noun = [i for i in places if names & set(words[i + 1 : i + 4])]
    for i in (before_noun or places)[:1]:
        a_range = words[i + 1 : i + 2] in (["or"], ["to"]) and any(word in numbers for word in words[i + 2 : i + 3])
        return None if a_range or "not" in words[max(0, i - 2) : i] else numbers[words[i]]
    return None
