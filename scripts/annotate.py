"""Makes pairs of pictures and asks people which one they like better, in a browser.

    python -m scripts.annotate --config config/emoji.py --pairs 500      (a preset's base model, or another --model)
    python -m scripts.annotate --run runs/NAME --prompts "a cat" "a dog" (a finetuned one)
    python -m scripts.annotate --images FOLDER                           (pictures that exist)

Everything lands in --output: images/ and pairs.jsonl, made first, and choices.jsonl, to which each click is appended
and flushed to disk at once. Start it again and every rater goes on where they stopped. Then:

    python -m scripts.train_reward --choices OUTPUT/choices.jsonl --output runs/my-reward

Two pictures of a pair share their prompt, not their noise. With --images, FOLDER/NAME.txt is the caption of
FOLDER/NAME.png, and only pictures of the same caption are compared. Which one stands left is drawn for each rater.
Keys: left and right arrow, down for a tie, s to skip, u to undo.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch
from tqdm import tqdm

from ddpo import prompts
from ddpo.checkpoint import list_checkpoints
from ddpo.errors import InputError, at_least, run_script
from ddpo.options import load_preset
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy, load_weights
from ddpo.reward_model import read_choices, read_jsonl
from ddpo.seeds import numpy_generator
from scripts.sample import open_run

PAGE = Path(__file__).parent / "annotate.html"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


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
            policy, doubled, lambda k: draw_noise(shape, seed, pairs[k // 2], k % 2), sample.guidance_scale, sample.eta
        ).images
        for k, (i, text) in enumerate(zip(pairs, texts)):
            names = [f"images/{i:05d}{letter}.png" for letter in "ab"]
            for name, picture in zip(names, pictures[2 * k : 2 * k + 2]):
                picture.save(output / name)
            append_line(output / "pairs.jsonl", {"pair": i, "prompt": text, "images": names})


def pair_up(folder, output, pairs, count, seed=0):
    """Pairs the pictures of a folder, those of one caption with each other, and appends to OUTPUT/pairs.jsonl, which
    has `pairs` already, until it has `count`: captions mixed, and the pictures least used so far first. Raises
    InputError if no two pictures can be compared."""
    if not os.path.isdir(folder):
        raise InputError(f"--images {folder}: there is no such folder")
    captions = {}
    for path in sorted(p for p in Path(folder).resolve().iterdir() if p.suffix.lower() in IMAGES):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.exists() else ""
        captions.setdefault(caption, []).append(str(path))
    if not any(len(paths) > 1 for paths in captions.values()):
        raise InputError(f"--images {folder}: it has no two pictures ({', '.join(IMAGES)}) with the same caption")
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
        rng.shuffle(added)  # else whoever stops early has judged the first captions alone
        pairs += [{"pair": before + i, "prompt": text, "images": images} for i, (text, images) in enumerate(added)]
    for pair in pairs[first:count]:
        append_line(output / "pairs.jsonl", pair)


def read_pairs(path):
    """The pairs of a pairs.jsonl; none if there is no such file. Raises InputError that names a line that is not the
    pair that should stand there, or a picture that is missing."""
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
            raise InputError(f"{path}: the picture {missing} of pair {i} is not there")
    return pairs


# -------------------------------------------------------------------------------------------------------- the choices
def shown(pair, rater):
    """(left, right) picture of a pair for this rater: the sides are drawn, lest a habit of the hand be learned."""
    swap = hashlib.sha256(f"{rater}/{pair['pair']}".encode()).digest()[0] % 2
    return pair["images"][::-1] if swap else list(pair["images"])


def append_line(path, record):
    """Appends one line and waits until it is on the disk. A line that a kill cut short gets its end first."""
    with open(path, "ab+") as f:
        if f.seek(0, os.SEEK_END) and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            f.write(b"\n")
        f.write((json.dumps(record) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def history(path, rater):
    """The pair numbers that a rater has answered, in order, without those undone."""
    return [record["pair"] for record in read_choices([path]) if record["rater"] == rater] if path.exists() else []


class Handler(BaseHTTPRequestHandler):
    """GET / the page; /state?rater=NAME what to show; /image/PAIR/0 or 1; POST /choice {rater, pair, choice}."""

    def __init__(self, *args, output, pairs, lock):
        self.output, self.pairs, self.lock = output, pairs, lock
        super().__init__(*args)

    def do_GET(self):
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        if url.path == "/":
            self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/state":
            with self.lock:
                self.reply(self.state(parse_qs(url.query).get("rater", [""])[0]))
        elif len(parts) == 3 and parts[0] == "image" and parts[1].isdigit() and parts[2] in ("0", "1"):
            if int(parts[1]) >= len(self.pairs):
                return self.send_error(404)
            name = self.pairs[int(parts[1])]["images"][int(parts[2])]  # only what pairs.jsonl names is ever served
            try:
                self.reply((self.output / name).read_bytes(), "image/*")
            except FileNotFoundError:
                self.send_error(404)
        else:
            self.send_error(404)

    def do_POST(self):
        try:
            record = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rater, pair, choice = str(record["rater"]).strip(), record["pair"], record["choice"]
            if not rater or choice not in ("left", "right", "tie", "skip", "undo") or type(pair) is not int:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            return self.send_error(400)
        if self.headers.get("Content-Type") != "application/json":  # which a foreign page cannot send unasked
            return self.send_error(415)
        path = self.output / "choices.jsonl"
        with self.lock:
            done = history(path, rater)
            if choice == "undo":
                if done:
                    append_line(path, {"pair": done[-1], "choice": "undo", "rater": rater, "time": time.time()})
            elif 0 <= pair < len(self.pairs) and pair not in done:  # a double click answers once
                left, right = shown(self.pairs[pair], rater)
                answer = {"pair": pair, "prompt": self.pairs[pair]["prompt"], "left": left, "right": right}
                append_line(path, {**answer, "choice": choice, "rater": rater, "time": time.time()})
            self.reply(self.state(rater))

    def state(self, rater):
        """What the page shows next to this rater, and how far they are."""
        done = history(self.output / "choices.jsonl", rater)
        answered = set(done)
        pair = next((pair for pair in self.pairs if pair["pair"] not in answered), None)
        state = {"done": len(answered), "total": len(self.pairs), "pair": None}
        if pair is not None:
            places = [pair["images"].index(name) for name in shown(pair, rater)]
            left, right = (f"/image/{pair['pair']}/{place}" for place in places)
            state |= {"pair": pair["pair"], "prompt": pair["prompt"], "left": left, "right": right}
        return state

    def reply(self, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def check_source(args, output, drawing):
    """Raises InputError if the pairs in a folder are of other pictures than those asked for; OUTPUT/source.json says
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
        policy.set_timesteps(config.sample.num_steps)
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
    try:
        config = load_preset(args.config)
    except (OSError, KeyError, SyntaxError) as error:
        raise InputError(f"--config {args.config}: no preset can be read there ({error})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return config, load_policy(args.model or config.model, 0, config.precision, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", default="", help="a run's folder: pictures of its newest checkpoint")
    source.add_argument("--config", default="", help="a preset: pictures of its base model, drawn with its options")
    source.add_argument("--images", default="", help="a folder of pictures")
    parser.add_argument("--model", default="", help="with --config: another base model, folder or hub name")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="a prompt set, a text file, or prompts; default: the run's or preset's"
    )
    parser.add_argument("--pairs", type=at_least(1), default=500, help="how many there should be at least")
    parser.add_argument("--output", default="", help="default: RUN/annotations or runs/annotations-NAME")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others on the network in; there is no login")
    parser.add_argument("--port", type=at_least(0), default=8600)
    parser.add_argument("--draw_only", action="store_true", help="make the pairs and end")
    args = parser.parse_args()

    preset, _, variant = args.config.partition(":")
    name = "-".join([Path(args.images or args.model or preset).stem, *filter(None, variant.split(","))])
    output = Path(args.output or (f"{args.run}/annotations" if args.run else f"runs/annotations-{name}"))
    output.mkdir(parents=True, exist_ok=True)
    make_pairs(args, output)
    if args.draw_only:
        return print(output)
    pairs = read_pairs(output / "pairs.jsonl")  # all: --pairs is how many there should be at least
    history(output / "choices.jsonl", "")  # if it cannot be read, now is the time to say so
    handler = functools.partial(Handler, output=output, pairs=pairs, lock=threading.Lock())
    try:
        server = ThreadingHTTPServer((args.host, args.port), handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {args.host}:{args.port}: {error}. Try another --port") from error
    print(f"http://{args.host}:{server.server_port} asks about {len(pairs)} pairs; Ctrl-C ends it\n"
          f"choices go to {output / 'choices.jsonl'}", flush=True)  # fmt: skip
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run_script(main)
