"""Rewards that ask a vision-language model: in this process, from `transformers serve`, and from servers that fail."""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Handler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from config.base import get_config
from ddpo import prompts, rewards, vlm
from ddpo.errors import InputError

WORDS = "the image contains a cat dog riding bike washing dishes how many are there in this what animal is two three"
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} answer"
)


def word_tokenizer(specials, template):
    """A tokenizer of whole words, with `specials` first."""
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, vocabulary[word]) for word in specials]
        )
    return tokenizer


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA with random weights, LLaVA's processor and a chat template."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(["<unk>", "<s>", "</s>", "<pad>", "<image>"], ""),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=7, initializer_range=0.5),
        text_config=LlamaConfig(
            **small, **special, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.5
        ),
        image_token_index=4,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 2))  # random weights end no answer otherwise
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["[UNK]", "[CLS]", "[SEP]", "[PAD]"], "[CLS] $A [SEP]")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=40, **small, initializer_range=1.0)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)] + [
        Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "white")
    ]


def options(**overrides):
    result = get_config().reward_options
    result.update(overrides)
    return result


def test_bertscore_recall_is_its_definition(bert):
    """The mean over the reference's tokens of the largest cosine with a token of the candidate: for sentences whose
    order by length differs between the two lists, which torchmetrics 1.9.0 gets wrong in a batch."""
    from transformers import AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    candidates = ["a dog riding a bike", "cat", "the image contains two cat washing dishes a bike", "three dog", ""]
    references = ["the image contains a cat", "the image contains a dog riding a bike", "the cat", "a dog", "a cat"]

    def embed(sentence, layer):
        with torch.no_grad():
            states = network(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
        return torch.nn.functional.normalize(states[layer][0, 1:-1], dim=-1)  # without [CLS] and [SEP]

    for layer in (1, 2):
        expected = [
            (embed(reference, layer) @ embed(candidate, layer).T).max(1).values.mean().item() if candidate else 0.0
            for candidate, reference in zip(candidates, references)
        ]
        recall = vlm.bertscore_recall(network, tokenizer, layer, candidates, references)
        np.testing.assert_allclose(recall, expected, atol=1e-5)
        assert np.ptp(expected[:4]) > 0.05


def test_answers_are_read_as_a_person_reads_them():
    """67 phrasings with a person's verdict: all but those that list the animals, where a person adds up."""
    how_many, what = "How many {} are there in this image?", "What animal is in this image?"
    lines = [line.split("\t") for line in (ROOT / "tests/counting_phrasings.tsv").read_text().splitlines()[1:]]
    differing = []
    for answer, question, expected, verdict in lines:
        question = how_many.format(question.split()[-1]) if question.startswith("how many") else what
        if vlm.is_right(answer, expected, question) != (verdict == "yes"):
            differing.append(answer)
    assert len(lines) == 67
    assert differing == ["one cat and two cats", "one black cat and two white cats", "a cat and another cat"]


@pytest.fixture(scope="module")
def served(llava, tmp_path_factory):
    """`transformers serve` with the random LLaVA; its address up to /v1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")  # noqa: SIM115
    program = Path(sys.executable).parent / "transformers"
    command = [program, "serve", llava, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            break
        except OSError:
            log.seek(0)
            assert process.poll() is None, log.read()
            time.sleep(0.5)
    yield f"{address}/v1"
    process.kill()
    process.wait()


def test_both_backends_give_the_same_answers(llava, served, images):
    questions = ["what animal is this", "how many cat are there"] * 3
    here = vlm.load_vlm(llava, batch_size=4)(images, questions)
    there = vlm.load_vlm(served, vlm_name=llava, concurrency=3)(images, questions)
    assert here == there
    assert len(set(here[::2])) > 1 and any(here)  # the images are seen: the same question, different answers


def test_alignment_and_counting_from_a_server(llava, bert, served, images):
    settings = options(bertscore_model=bert, bertscore_layer=2, vlm_name=llava)
    texts = ["a cat", "a dog riding a bike"] * 3
    there, _ = rewards.get_reward(f"alignment:{served}", options=settings)(images, texts, [{}] * 6)
    here, _ = rewards.get_reward(f"alignment:{llava}", options=settings)(images, texts, [{}] * 6)
    np.testing.assert_allclose(here, there, atol=1e-6)
    assert np.ptp(here) > 1e-3 and here.dtype == np.float32
    drawn = prompts.counting()[:6]
    counting = rewards.get_reward(f"counting:{served}", options=settings)
    values, _ = rewards.compute_rewards(counting, images, [p for p, _ in drawn], [m for _, m in drawn])
    assert set(values.tolist()) <= {0.0, 0.5, 1.0}
    with pytest.raises(InputError, match="^reward counting:.*needs prompts with questions.*'a cat'"):
        rewards.get_reward(f"counting:{served}", options=settings, prompt_set=[*drawn, ("a cat", {})])


def test_geneval_by_the_model_in_this_process(llava, images):
    drawn = prompts.geneval()[:6]
    reward = rewards.get_reward(f"geneval:{llava}", options=options(max_unusable=1.0), prompt_set=drawn)
    values, info = rewards.compute_rewards(reward, images, [p for p, _ in drawn], [m for _, m in drawn])
    assert ((values >= 0) & (values <= 1)).all() and (info["geneval_correct"] <= values).all()
    with pytest.raises(InputError, match="^reward geneval:.*needs prompts with GenEval's metadata.*'a cat'"):
        rewards.get_reward(f"geneval:{llava}", prompt_set=[*drawn, ("a cat", {})])


def test_alignment_and_counting_share_their_model(llava, bert):
    loads = vlm.load_vlm.cache_info().misses
    settings = options(bertscore_model=bert, bertscore_layer=2)
    rewards.get_reward(f"alignment:{llava} + counting:{llava}", options=settings)
    assert vlm.load_vlm.cache_info().misses <= loads + 1


def test_a_model_that_does_not_chat_is_refused(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    with pytest.raises(InputError, match="reward counting.*/mute has no chat template"):
        rewards.get_reward(f"counting:{tmp_path / 'mute'}")


class Script(Handler):
    """A server that answers with the (body, status) that `plan(number of the request, its body)` returns."""

    def do_GET(self):
        self.reply({"data": [{"id": "some-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            headers = {name.title(): value for name, value in self.headers.items()}
            self.server.requests.append((self.path, headers, body))
            number = len(self.server.requests)
        planned = self.server.plan(number, body)
        if isinstance(planned, tuple):
            self.reply(*planned)
        elif planned is not None:  # a function that writes the answer itself
            planned(self)


@pytest.fixture
def scripted(http_server, monkeypatch):
    server = http_server(Script)
    server.requests, server.lock, server.pauses = [], threading.Lock(), []
    server.address += "/v1"

    async def sleep(seconds):
        server.pauses.append(seconds)

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)  # between the client's attempts
    vlm.load_vlm.cache_clear()
    return server


def said(text):
    return ({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]},)


def colour_of(body):
    """What image a request holds."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    prefix, data = url.split(",", 1)
    assert prefix == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format == "JPEG"
    return "red" if picture.getpixel((5, 5))[0] > 128 else "blue"


def test_answers_come_back_in_order_over_concurrent_retried_requests(scripted, monkeypatch):
    """Every second request fails at first; each image still gets its own answer, and the key its header."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    scripted.plan = lambda number, body: (b"busy", 503) if number % 2 else said(f" {colour_of(body)} ")
    colours = ["red", "blue", "blue", "red", "blue"]
    pictures = [Image.new("RGB", (16, 16), colour) for colour in colours]
    # One at a time, so that "every second" is each image's first attempt.
    assert vlm.load_vlm(scripted.address, concurrency=1)(pictures, ["what?"] * 5) == [vlm.Answer(c) for c in colours]
    assert len(scripted.requests) == 10 and len(scripted.pauses) == 5 and all(0.2 < p <= 0.5 for p in scripted.pauses)
    path, headers, body = scripted.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-model" and body["temperature"] == 0 and headers["Content-Type"] == "application/json"
    scripted.plan = lambda number, body: said(colour_of(body))
    assert vlm.load_vlm(scripted.address, concurrency=5)(pictures, ["what?"] * 5) == [vlm.Answer(c) for c in colours]


def test_what_the_paper_asks(scripted, bert):
    """The question, the JPEG's quality, and which of the two texts is recalled in which."""
    scripted.plan = lambda number, body: said({"red": "a cat riding", "blue": "dog"}[colour_of(body)])
    settings = options(bertscore_model=bert, bertscore_layer=2)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    values, _ = rewards.get_reward(f"alignment:{scripted.address}", options=settings)(pictures, ["a cat"] * 2, [{}] * 2)
    network, tokenizer = BertModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
    recalls = []
    for description in ("a cat riding", "dog"):
        embeddings = []
        for text in (description, "The image contains a cat"):
            layers = network(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            embeddings.append(torch.nn.functional.normalize(layers[2][0, 1:-1].detach(), dim=-1))  # no [CLS], [SEP]
        recalls.append(float((embeddings[1] @ embeddings[0].T).max(1).values.mean()))
    np.testing.assert_allclose(values, recalls, atol=1e-5)
    assert recalls[0] > recalls[1]
    content = scripted.requests[0][2]["messages"][0]["content"]
    assert content[1]["text"] == "Answer concisely: what is going on in this image?"
    sent = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].split(",")[1])))
    buffer = io.BytesIO()
    pictures[0].save(buffer, "JPEG", quality=80)
    assert sent.quantization == Image.open(buffer).quantization


def test_answers_are_counted(scripted):
    """Two questions a picture: how many, and what animal."""
    scripted.plan = lambda number, body: said(
        "three" if "how many" in body["messages"][0]["content"][1]["text"].lower() else "I see a cat."
    )
    metadata = [{"questions": ["How many cats?", "What animal?"], "answers": [n, a]}
                for n, a in (("three", "cat"), ("two", "cat"), ("two", "dog"))]  # fmt: skip
    pictures = [Image.new("RGB", (16, 16), "red")] * 3
    values, _ = rewards.get_reward(f"counting:{scripted.address}")(pictures, ["cats"] * 3, metadata)
    assert values.tolist() == [1.0, 0.5, 0.0]


def test_geneval_asks_about_each_object_of_each_picture(scripted):
    """A red cat alone, and two dogs, of which the questions of one prompt are true; an image without usable answer."""

    def plan(number, body):
        text = body["messages"][0]["content"][1]["text"]
        if colour_of(body) == "blue":
            return said("two" if "dogs" in text else "")
        return said("Red." if "color" in text else "one" if "cats" in text else "none")

    scripted.plan = plan
    cat = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    dog = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    dogs = {"include": [{"class": "dog", "count": 2}]}
    both = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
    cases = [("red", cat, 1), ("red", dog, 0), ("red", both, 0.5), ("blue", dogs, 1), ("blue", cat, 2.5 / 4)]
    pictures = [Image.new("RGB", (16, 16), colour) for colour, _, _ in cases]
    reward = rewards.get_reward(f"geneval:{scripted.address}")
    values, info = rewards.compute_rewards(reward, pictures, ["pets"] * 5, [m for _, m, _ in cases])
    assert values.tolist() == [value for _, _, value in cases]
    assert info["geneval_correct"].tolist() == [1, 0, 0, 1, 0.5] and info["vlm_unusable"].tolist() == [0, 0, 0, 0, 1]
    asked = sorted(body["messages"][0]["content"][1]["text"] for _, _, body in scripted.requests)
    assert len(asked) == 9 and asked[-1] == "What color is the dog in this image? Answer with one word."


def test_a_key_with_a_line_end(scripted, monkeypatch):
    """As files of secrets have: it is sent without, and it is in no message."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    scripted.plan = lambda number, body: said("yes")
    assert vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"]) == [vlm.Answer("yes")]
    assert scripted.requests[0][1]["Authorization"] == "Bearer secret"


def test_a_failing_server_names_the_picture(scripted):
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "red", "blue")]
    ask = vlm.load_vlm(scripted.address, concurrency=1)
    scripted.plan = lambda number, body: said("yes") if colour_of(body) == "red" else (b"out of memory", 500)
    with pytest.raises(InputError, match="image 2 of 3.*'what[?]'.*500.*out of memory") as error:
        ask(pictures, ["what?"] * 3)
    assert len(scripted.requests) == 2 + vlm.ATTEMPTS and "\n" not in str(error.value)
    assert len(scripted.pauses) == vlm.ATTEMPTS - 1
    assert all(0.5 * 2**i * 0.5 <= pause <= 0.5 * 2**i for i, pause in enumerate(scripted.pauses))
    scripted.requests.clear()
    scripted.plan = lambda number, body: (b"no such key", 401)  # asking again would not help
    with pytest.raises(InputError, match="image 0.*401.*no such key"):
        ask(pictures[:1], ["what?"])
    assert len(scripted.requests) == 1
    scripted.plan = lambda number, body: ({"error": "?"},)
    with pytest.raises(InputError, match="image 0 with no message"):
        ask(pictures, ["what?"] * 3)
    scripted.plan = lambda number, body: (b"<html>",)
    with pytest.raises(InputError, match="image 0.*not JSON"):
        ask(pictures, ["what?"] * 3)


def test_a_server_that_overloads_says_when_to_ask_again(scripted):
    def busy(handler):
        handler.send_response(429)
        handler.send_header("Retry-After", "7")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    scripted.plan = lambda number, body: busy if number == 1 else said("yes")
    assert vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"]) == [vlm.Answer("yes")]
    assert scripted.pauses == [7]


def test_an_answer_that_is_not_json_is_asked_for_again(scripted):
    scripted.plan = lambda number, body: (b"<html>",) if number < 3 else said("yes")
    assert vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"]) == [vlm.Answer("yes")]
    assert len(scripted.requests) == 3


def test_the_timeout_is_of_a_whole_request(scripted, monkeypatch):
    """A server that sends a byte every now and then, each within the timeout."""
    monkeypatch.setattr(vlm, "ATTEMPTS", 1)

    def trickle(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client hangs up
            for _ in range(60):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.1)

    scripted.plan = lambda number, body: trickle
    start = time.perf_counter()
    with pytest.raises(InputError, match="image 0.*no answer within 0.5 s"):
        vlm.load_vlm(scripted.address, timeout=0.5)([Image.new("RGB", (16, 16))], ["what?"])
    assert time.perf_counter() - start < 4  # the answer would take 6 s


def test_the_key_follows_no_redirect(scripted, http_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "top-secret")
    other = http_server(Script)
    other.requests, other.lock, other.plan = [], threading.Lock(), lambda number, body: said("yes")

    def away(handler):
        handler.send_response(307)
        handler.send_header("Location", f"{other.address}/v1/chat/completions")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    scripted.plan = lambda number, body: away
    with pytest.raises(InputError, match="HTTP 307: redirect to .*, refused"):
        vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"])
    assert other.requests == [] and len(scripted.requests) == 1
    scripted.plan = lambda number, body: (b"the key top-secret is unknown", 401)
    with pytest.raises(InputError) as error:
        vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"])
    assert "the key *** is unknown" in str(error.value)


UNUSABLE = {
    "empty": {"message": {"content": ""}, "finish_reason": "stop"},
    "only thoughts": {"message": {"content": "<think>A cat? A dog?"}, "finish_reason": "stop"},
    "filtered": {"message": {"content": "three"}, "finish_reason": "content_filter"},
    "refused": {"message": {"content": None, "refusal": "I will not look."}, "finish_reason": "stop"},
    "cut off": {"message": {"content": "three cats, or rather"}, "finish_reason": "length"},
}


@pytest.mark.parametrize("choice", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_answers_are_not_wrong_answers(scripted, choice):
    """The image gets the mean of the others and is counted; too many of them end the run."""
    scripted.plan = lambda number, body: ({"choices": [choice]},) if colour_of(body) == "blue" else said("three")
    metadata = [{"questions": ["How many cats are there?"], "answers": [n]} for n in ("three", "two", "three")]
    colours = ["red", "red", "blue"]
    counting = rewards.get_reward(f"counting:{scripted.address}")

    def score(colours):
        pictures = [Image.new("RGB", (16, 16), colour) for colour in colours]
        return rewards.compute_rewards(counting, pictures, ["cats"] * 3, metadata)

    values, info = score(colours)
    assert values.tolist() == [1.0, 0.0, 0.5] and info["vlm_unusable"].tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="no usable answer for 2 of 3 images"):
        score(["red", "blue", "blue"])


def test_thoughts_are_not_part_of_the_answer(scripted):
    scripted.plan = lambda number, body: said("<think>Two? No, wait.</think>\nThree cats.")
    assert vlm.load_vlm(scripted.address)([Image.new("RGB", (16, 16))], ["what?"]) == [vlm.Answer("Three cats.")]


def test_a_server_that_hangs_or_is_none_or_is_not_there(scripted, http_server):
    hang = threading.Event()
    scripted.plan = lambda number, body: hang.wait(5)  # longer than the timeout
    ask = vlm.load_vlm(scripted.address, timeout=0.2)
    start = time.perf_counter()
    with pytest.raises(InputError, match="image 0.*no answer within 0.2 s"):
        ask([Image.new("RGB", (16, 16))], ["what?"])
    assert time.perf_counter() - start < 4 and len(scripted.requests) == vlm.ATTEMPTS
    hang.set()

    class NotHTTP(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1000)
            self.request.sendall(b"+OK POP3 server ready\r\n")

    with pytest.raises(InputError, match="no server at "):
        rewards.get_reward(f"counting:{http_server(NotHTTP).address}/v1")
    with pytest.raises(InputError, match="no server at http://127.0.0.1:9/v1"):
        rewards.get_reward("counting:http://127.0.0.1:9/v1")
