"""Makes pairs of images and asks people which one they like better, in a browser.

    python -m scripts.annotate --config config/emoji.py --pairs 500      (a preset's base model, or another --model)
    python -m scripts.annotate --run runs/NAME --prompts "a cat" "a dog" (a finetuned one)
    python -m scripts.annotate --images FOLDER                           (images that exist)

Everything lands in --output: images/ and pairs.jsonl, made first, and choices.jsonl, to which each click is appended
and flushed to disk at once. Start it again and every rater goes on where they stopped, each under their name. Then:

    python -m scripts.train_reward --choices OUTPUT/choices.jsonl --output runs/my-reward

Two images of a pair share their prompt, not their noise. With --images, FOLDER/NAME.txt is the caption of
FOLDER/NAME.png, and only images of the same caption are compared. Which one stands left is drawn for each rater.
Keys: left and right arrow, down for a tie, s to skip, u to undo. One pair in ten is asked a second time with its sides
swapped; how often the two answers agree is shown at the end. The second answers say "repeat": true in choices.jsonl and
are not trained on.
"""

import argparse
import errno
import hashlib
import ipaddress
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import fastapi
import torch
import uvicorn
from fastapi.responses import FileResponse, JSONResponse
from tqdm import tqdm

from ddpo import prompts
from ddpo.checkpoint import list_checkpoints
from ddpo.errors import PICTURES, InputError, at_least, run_script, seed
from ddpo.options import load_preset
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy, load_weights
from ddpo.reward_model import read_choices, read_jsonl
from ddpo.run import lock_run
from ddpo.seeds import numpy_generator
from scripts.sample import open_run

PAGE = Path(__file__).parent / "annotate.html"
LATER = 20  # new pairs between the first time a pair is asked and the second: too many to remember


# ---------------------------------------------------------------------------------------------------- making the pairs
def draw_pairs(policy, prompt_set, output, first, count, sample, seed=0):
    """Draws pairs `first` to `count` - 1 and appends them to OUTPUT/pairs.jsonl.

    Pair i, its prompt and its noise are a function of (seed, i): a folder can be enlarged later, and is the same then.

    Args:
        policy: a `ddpo.policy.Policy`, its scheduler set to sample.num_steps.
        prompt_set: list of (prompt, metadata).
        sample: the `config.sample` that says guidance_scale, eta, num_steps, batch_size, height and width.
    """
    shape = policy.noise_shape(sample)
    (output / "images").mkdir(parents=True, exist_ok=True)
    per_batch = max(1, sample.batch_size // 2)
    for start in tqdm(range(first, count, per_batch), "drawing pairs", disable=first >= count):
        pairs = list(range(start, min(start + per_batch, count)))
        texts = [prompt_set[numpy_generator("prompt", seed, i).integers(len(prompt_set))][0] for i in pairs]

        doubled = [text for text in texts for _ in range(2)]
        pictures = sample_with_logprob(
            policy,
            doubled,
            lambda k: draw_noise(shape, seed, pairs[k // 2], k % 2),
            sample.guidance_scale,
            policy.noise_level(sample),
        ).images
        for k, (i, text) in enumerate(zip(pairs, texts)):
            names = [f"images/{i:05d}{letter}.png" for letter in "ab"]
            for name, picture in zip(names, pictures[2 * k : 2 * k + 2]):
                picture.save(output / name)
            append_line(output / "pairs.jsonl", {"pair": i, "prompt": text, "images": names})


def pair_up(folder, output, pairs, count, seed=0):
    """Pairs the images of a folder, those of one caption with each other, and appends to OUTPUT/pairs.jsonl, which
    has `pairs` already, until it has `count`: captions mixed, and the images least used so far first. Raises
    InputError if no two images can be compared."""
    if not os.path.isdir(folder):
        raise InputError(f"--images {folder}: there is no such folder")
    captions = {}
    for path in sorted(p for p in Path(folder).resolve().iterdir() if p.suffix.lower() in PICTURES):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else ""
        captions.setdefault(caption, []).append(str(path))
    if not any(len(paths) > 1 for paths in captions.values()):
        raise InputError(f"--images {folder}: it has no two images ({', '.join(PICTURES)}) with the same caption")
    pairs, first, before = list(pairs), len(pairs), -1
    rng, seen = random.Random(f"{seed}/{first}"), {tuple(sorted(pair["images"])) for pair in pairs}
    used = Counter(name for pair in pairs for name in pair["images"])
    while before < len(pairs) < count:  # until there are enough, or (nearly) all there are
        before, added = len(pairs), []
        for caption, paths in captions.items():
            rng.shuffle(paths)
            if before == first:
                paths.sort(key=used.__getitem__)  # which keeps the shuffled order of those used as often
            for a, b in zip(paths[::2], paths[1::2]):
                if tuple(sorted((a, b))) not in seen:
                    seen.add(tuple(sorted((a, b))))
                    added.append((caption, [a, b]))
        rng.shuffle(added)  # otherwise whoever stops early has judged only the first captions
        pairs += [{"pair": before + i, "prompt": text, "images": images} for i, (text, images) in enumerate(added)]
    for pair in pairs[first:count]:
        append_line(output / "pairs.jsonl", pair)


def read_pairs(path):
    """The pairs of a pairs.jsonl; none if there is no such file. Raises InputError that names a line that is not the
    pair that should stand there, or an image that is missing."""
    pairs = read_jsonl(path) if path.exists() else []
    for i, pair in enumerate(pairs):
        try:
            a, b = pair["images"]
            missing = next((name for name in (a, b) if not (path.parent / name).exists()), None)
            if pair["pair"] != i or not isinstance(pair["prompt"], str):
                raise ValueError(f"it should be pair {i}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: {pair} is not a pair of scripts.annotate ({error})") from error
        if missing:
            raise InputError(f"{path}: the image {missing} of pair {i} is not there")
    return pairs


# -------------------------------------------------------------------------------------------------------- the choices
def shown(pair, rater, repeat=False):
    """(left, right) image of a pair for this rater: the sides are drawn, so that a habit of choosing one side
    is not learned. The second time they are swapped."""
    swap = hashlib.sha256(f"{rater}/{pair['pair']}".encode()).digest()[0] % 2 != repeat
    return pair["images"][::-1] if swap else list(pair["images"])


def append_line(path, record):
    """Appends one line and waits until it is on the disk. A line that a kill cut short gets its end first. Raises
    OSError, and leaves the file as it was, if there is no room."""
    line = (json.dumps(record) + "\n").encode()
    with open(path, "ab+", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        if size and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            line = b"\n" + line
        try:
            if f.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(f.fileno())
        except OSError:
            f.truncate(size)
            raise


def list_questions(count, repeat_every):
    """[(pair, repeat)], in the order asked: pairs 0 to count - 1, and each `repeat_every`-th (0: none) once more,
    `LATER` pairs later. More pairs lengthen the list and leave its beginning as it was."""
    questions = []
    for pair in range(count):
        questions.append((pair, False))
        if repeat_every and pair >= LATER and (pair - LATER) % repeat_every == 0:
            questions.append((pair - LATER, True))
    return questions


def summarize(answers):
    """Sentences on how carefully a rater answered, from {(pair, repeat): choice}."""
    sentences, left, right = [], *(list(answers.values()).count(side) for side in ("left", "right"))
    if clear := left + right:
        share = f"The left image (on a phone, the upper) was chosen in {left / clear:.0%} of {clear} clear choices."
        sentences.append(f"{share} Sides are drawn by chance: far from half is a habit.")
    both = [(answers.get((pair, False)), choice) for (pair, repeat), choice in answers.items() if repeat]
    both = [choices for choices in both if None not in choices and "skip" not in choices]
    if both:  # the sides were swapped in between
        same = sum(choices in (("left", "right"), ("right", "left"), ("tie", "tie")) for choices in both)
        share = f"Of {len(both)} pairs asked twice, {same} ({same / len(both):.0%}) were answered the same way."
        sentences.append(f"{share} Guessing gives about half.")
    return sentences


class Votes:
    """What every rater has answered and is asked next. It is all in memory, so that a vote costs the same after 20,000
    as after 20; and each vote is on the disk, in OUTPUT/choices.jsonl, before it counts."""

    def __init__(self, output, pairs, repeat_every=10):
        self.output, self.pairs, self.path = output, pairs, output / "choices.jsonl"
        self.questions = list_questions(len(pairs), repeat_every)
        self.answers = {}  # of each rater {(pair, repeat): choice}, the last answer last
        self.places = {}  # of each rater the first question that may be unanswered
        for vote in read_choices([self.path], repeats=True) if self.path.exists() else ():
            self.answers.setdefault(vote["rater"], {})[vote["pair"], vote.get("repeat", False)] = vote["choice"]

    def question(self, rater):
        """(pair, repeat) that comes next, or (None, False) at the end."""
        answers, place = self.answers.get(rater, {}), self.places.get(rater, 0)
        while place < len(self.questions) and self.questions[place] in answers:
            place += 1
        if answers:  # who only looks takes no memory
            self.places[rater] = place
        return self.questions[place] if place < len(self.questions) else (None, False)

    def state(self, rater):
        """What the page shows next to this rater, and how far they are. Its `ticket` stands for what is shown where."""
        pair, repeat = self.question(rater)
        answers, total = self.answers.get(rater, {}), len(self.questions)
        state = {"done": min(len(answers), total), "total": total, "pair": pair}
        if pair is None:
            state["summary"] = summarize(answers)
        else:
            images, prompt = self.pairs[pair]["images"], self.pairs[pair]["prompt"]
            sides = [f"/image/{pair}/{images.index(name)}" for name in shown(self.pairs[pair], rater, repeat)]
            state |= {"prompt": prompt, "left": sides[0], "right": sides[1]}
        ticket = hashlib.sha256(repr((self.output.resolve(), state.get("prompt"), pair, repeat)).encode()).hexdigest()
        return state | {"ticket": ticket[:16]}

    def record(self, rater, choice):
        """Writes down the answer to the question at hand, or takes the last one back. Raises OSError if the disk is
        full, and nothing has changed then."""
        answers = self.answers.get(rater, {})
        if choice == "undo" and not answers:
            return
        pair, repeat = question = next(reversed(answers)) if choice == "undo" else self.question(rater)
        line = {"pair": pair}
        if choice != "undo":
            left, right = shown(self.pairs[pair], rater, repeat)
            line |= {"prompt": self.pairs[pair]["prompt"], "left": left, "right": right}
        line |= {"choice": choice, "rater": rater, "time": time.time()} | ({"repeat": True} if repeat else {})
        append_line(self.path, line)
        if choice == "undo":
            del answers[question]
            self.places[rater] = 0
        else:
            self.answers.setdefault(rater, {})[question] = choice


# --------------------------------------------------------------------------------------------------------- the server
def is_address_or(names, host):
    """Whether a Host header is one of these names or a bare address. Any other name may be a foreign page's own that
    was made to lead here (DNS rebinding), so that the browser lets that page read and post."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def make_app(votes, host, names):
    """The web application. GET / is the page, /state?rater=NAME what to show, /image/PAIR/0 or 1 an image; POST
    /choice takes {rater, pair, choice, ticket}, where a script may leave the ticket out.

    Args:
        votes: a `Votes`. Everything that touches it runs in one thread, one request after the other.
        host, names: what this server listens on, and names that a proxy has for it.
    """
    app = fastapi.FastAPI(openapi_url=None, max_body_size=4096)
    machine = socket.gethostname()
    own = {name.lower() for name in ("localhost", machine, f"{machine}.local", host, *names)}

    @app.middleware("http")
    async def guard(request, call_next):
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "").partition("://")
        if not is_address_or(own, host):
            return JSONResponse({"detail": f"this server does not know the name {host!r}; --names adds one"}, 403)
        if origin[0] and origin[2] != host and origin[2].partition(":")[0] not in names:
            return JSONResponse({"detail": "only the page of this server may post here"}, 403)
        response = await call_next(request)
        response.headers["Cache-Control"] = "no-store"  # the next folder on this port has images of the same names
        return response

    @app.get("/")
    async def page():
        return FileResponse(PAGE)

    @app.get("/state")
    async def state(rater: str):
        return votes.state(rater.strip())

    @app.get("/image/{pair}/{place}")
    async def image(pair: int, place: Annotated[int, fastapi.Path(ge=0, le=1)]):
        path = votes.output / votes.pairs[pair]["images"][place] if 0 <= pair < len(votes.pairs) else None
        if path is None or not path.is_file():  # only what pairs.jsonl names is ever served
            raise fastapi.HTTPException(404)
        return FileResponse(path, media_type="image/*")

    @app.post("/choice")
    async def choice(
        rater: Annotated[str, fastapi.Body(pattern=r"\S", max_length=60)],
        pair: Annotated[int | None, fastapi.Body(strict=True)],
        choice: Annotated[Literal["left", "right", "tie", "skip", "undo"], fastapi.Body()],
        ticket: Annotated[str, fastapi.Body()] = "",
    ):
        rater = rater.strip()
        now = votes.state(rater)
        if pair != now["pair"] or ticket not in ("", now["ticket"]) or (pair is None and choice != "undo"):
            message = "This page was out of date (did you answer in another tab?): your last choice did not count."
            return JSONResponse(now | {"message": message}, 409)
        try:
            votes.record(rater, choice)
        except OSError as error:
            print(f"{votes.path}: {error.strerror}", file=sys.stderr)
            raise fastapi.HTTPException(507, f"The server cannot save this choice: {error.strerror}.") from error
        return votes.state(rater)

    return app


def serve(votes, host, port, names):
    """Listens until Ctrl-C, then says how carefully each rater answered."""
    try:
        listener = socket.create_server((host, port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}. Try another --port") from error
    # 512 connections at once, more than the raters of any one folder have; those beyond are told so.
    config = uvicorn.Config(
        make_app(votes, host, names), backlog=1024, limit_concurrency=512, ws="none", loop="asyncio", http="h11",
        log_level="error", timeout_graceful_shutdown=3,
    )  # fmt: skip
    print(f"http://{host}:{listener.getsockname()[1]} asks about {len(votes.pairs)} pairs; Ctrl-C ends it\n"
          f"choices go to {votes.path}", flush=True)  # fmt: skip
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print()
    for rater, answers in votes.answers.items():
        print(f"{rater!r}: {len(answers)} answers.", *summarize(answers))


def check_source(args, output, drawing):
    """Raises InputError if the pairs in a folder are of other images than those asked for; OUTPUT/source.json says
    what they are of. If none are to be drawn, an older checkpoint's will do."""
    path = output / "source.json"
    source = {key: getattr(args, key) for key in ("run", "config", "model", "prompts", "seed")}
    source["images"] = os.path.abspath(args.images) if args.images else ""
    source["checkpoint"] = "".join(map(os.path.basename, list_checkpoints(args.run)[-1:])) if args.run else ""
    old = (read_jsonl(path) or [source])[0] if path.exists() else source
    for key in source:
        if old.get(key) != source[key] and (key != "checkpoint" or drawing):
            raise InputError(f"{output} holds pairs of another {key}, {old.get(key)!r}: choose another --output")
    if drawing:
        path.write_text(json.dumps(source) + "\n")


def check_pictures(pairs, output, images):
    """Raises InputError if a pair names an image outside the folder, or outside --images: a folder that came from
    elsewhere must not make this server show other files of this machine."""
    folder, images = output.resolve(), images and Path(images).resolve()
    for pair in pairs:
        for path in (output / name for name in pair["images"]):
            named = images and Path(os.path.normpath(path)).is_relative_to(images)  # links there are the user's own
            if not named and not path.resolve().is_relative_to(folder):
                raise InputError(f"{output / 'pairs.jsonl'}: the image {path} of pair {pair['pair']} lies outside "
                                 f"{output}{f' and --images {images}' if images else ''}")  # fmt: skip


def make_pairs(args, output):
    """Fills OUTPUT/pairs.jsonl up to args.pairs, from a model or from a folder."""
    existing = read_pairs(output / "pairs.jsonl")
    check_source(args, output, len(existing) < args.pairs)
    if len(existing) >= args.pairs:
        return
    if args.images:
        pair_up(args.images, output, existing, args.pairs, args.seed)
    else:
        config, policy = open_model(args)
        policy.prepare_sampling(config.sample)
        name = args.prompts[0] if args.prompts else config.prompts
        known = len(args.prompts) <= 1 and (name in prompts.PROMPT_SETS or prompts.is_file(name))
        prompt_set = prompts.get_prompts(name) if known else [(text, {}) for text in args.prompts]
        prompts.check_length([text for text, _ in prompt_set], policy.pipe.tokenizer)
        draw_pairs(policy, prompt_set, output, len(existing), args.pairs, config.sample, args.seed)


def open_model(args):
    """(config, policy) of --run, with its newest checkpoint's weights, or of --config, with --model instead of its."""
    if args.run:
        config, policy, folder = open_run(args.run)
        load_weights(policy, folder)
        return config, policy
    config = load_preset(args.config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return config, load_policy(args.model or config.model, 0, config.precision, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", default="", help="a run's folder: images of its newest checkpoint")
    source.add_argument("--config", default="", help="a preset: images of its base model, drawn with its options")
    source.add_argument("--images", default="", help="a folder of images")
    parser.add_argument("--model", default="", help="with --config: another base model, folder or hub name")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="a prompt set, a text file, or prompts; default: the run's or preset's"
    )
    parser.add_argument("--pairs", type=at_least(1), default=500, help="how many pairs to make at least")
    parser.add_argument("--output", default="", help="default: RUN/annotations or runs/annotations-NAME")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--repeat_every", type=at_least(0), default=10, help="one pair in this many is asked twice; 0: none"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others on the network in; there is no login")
    parser.add_argument(
        "--names", nargs="+", default=[], help="names under which a proxy or tunnel shows the page, if there is one"
    )
    parser.add_argument("--port", type=at_least(0), default=8600)
    parser.add_argument("--draw_only", action="store_true", help="make the pairs and start no server")
    args = parser.parse_args()

    preset, _, variant = args.config.partition(":")
    name = "-".join([Path(args.images or args.model or preset).stem, *filter(None, variant.split(","))])
    output = Path(args.output or (f"{args.run}/annotations" if args.run else f"runs/annotations-{name}"))
    output.mkdir(parents=True, exist_ok=True)
    lock_run(output)  # a second process would number its pairs and count its votes alike
    make_pairs(args, output)
    if args.draw_only:
        return print(output)
    pairs = read_pairs(output / "pairs.jsonl")  # all: --pairs is how many there should be at least
    check_pictures(pairs, output, args.images)
    serve(Votes(output, pairs, args.repeat_every), args.host, args.port, args.names)


if __name__ == "__main__":
    run_script(main)
