"""Speed and memory of training, part by part: alone, in turn with a peer or a variant, or as work grows.

    python -m scripts.dev.bench                                             # the embedded model on this machine
    python -m scripts.dev.bench --model sd15 --precision bf16 --set sample.images_per_epoch=64 sample.num_steps=50
    python -m scripts.dev.bench --against trl --repetitions 5 --json results/bench/trl-cpu.json
    python -m scripts.dev.bench --variant train.batch_size=4 --variant checkout=../other-commit
    python -m scripts.dev.bench --variant processes=2 threads=1 sample.batch_size=4 train.batch_size=4
    python -m scripts.dev.bench --profile
    python -m scripts.dev.bench --draw results/bench/trl-cpu.json
    python -m scripts.dev.bench --model tiny --scaling

What is timed is `train.train` itself, with the options given by --set and epochs let through one at a time: it logs
the seconds of its parts (ddpo/tracking.py), having waited for the device at the end of each. All contestants are
processes that live through the whole run and take epochs in turn, so that a machine that slows down slows all alike;
the others sleep meanwhile. The first epochs (--warmup) are not counted. Where others use the machine too, the ratio of
the processes' own CPU seconds says more than that of the clock's.

--against trl makes a virtual environment in --trl_folder, which sees this one's packages (so both run the same torch,
diffusers, transformers, peft and accelerate) and has trl 0.23.1 beside them.
Models other than emoji have random weights, on which speed does not depend; they are saved under --models_folder.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpo.errors import at_least, run_script
from scripts.provenance import commit, processor

ROOT = Path(__file__).parent.parent.parent
MODELS = ("emoji", "tiny", "tiny_xl", "sd15", "sd21", "sdxl")
PARTS = ("seconds_sampling", "seconds_rewards", "seconds_training", "seconds", "cpu_seconds")
DEFAULTS = {  # the comparison's: 4 batches of 8 images, 10 steps, guidance, one update a batch
    "sample.images_per_epoch": 32, "train.updates_per_epoch": 4, "sample.num_steps": 10, "sample.guidance_scale": 5.0,
    "sample.batch_size": 8, "train.batch_size": 8, "lora_rank": 4, "precision": "fp32", "prompts": "common_animals",
    "reward": "jpeg_compressibility", "grid_every": 0, "grid_images": 1, "save_every": 10**9, "keep_checkpoints": 1,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- contestants
def worker(options):
    """Runs train.train with `options` {dotted name: value}: prints a JSON line of metrics after each epoch, then waits
    for a line of input to go on. With the option "profile" it prints the ten costliest operations of its last epoch."""
    profile, processes = options.pop("profile", 0), options.pop("processes", 1)  # of several, the first one reports
    os.chdir(options.pop("checkout", ROOT))
    sys.path.insert(0, os.getcwd())
    import ddpo.run
    import train
    from config.base import get_config

    profiler = torch.profiler.profile()

    def gate(accelerator, run_dir, metrics):
        if profile and metrics["epoch"] == config.num_epochs - 1:
            profiler.stop()
            on_gpu = accelerator.device.type == "cuda"
            sort, averages = f"self_{'device' if on_gpu else 'cpu'}_time_total", profiler.key_averages()
            table = averages.table(sort_by=sort, row_limit=10, max_name_column_width=48, header=None)
            metrics["profile"] = table
        for name, grad in (("sampled_rows", False), ("trained_rows", True)):  # through the UNet, as in bench_trl.py
            metrics[name] = sum(size for g, size in passes if g == grad) * processes
        metrics["memory_gb"] = psutil.Process().memory_info().rss / 1e9
        metrics["cpu_seconds"] = (time.process_time() - cpu["start"]) * processes
        print(json.dumps(metrics), flush=True)
        passes.clear()
        sys.stdin.readline()
        cpu["start"] = time.process_time()
        if profile and metrics["epoch"] == config.num_epochs - 2:
            profiler.start()

    passes, load_policy, cpu = [], train.load_policy, {"start": time.process_time()}

    def load(*arguments):
        policy = load_policy(*arguments)
        policy.denoiser.register_forward_pre_hook(
            lambda _, given: passes.append((torch.is_grad_enabled(), len(given[0])))
        )
        return policy

    ddpo.run.log_metrics, train.load_policy = gate, load
    config = get_config()
    config.update_from_flattened_dict(options)
    train.train(config, "bench")


def launch(command, processes):
    """A command [Python, ...], to be run by so many processes."""
    launcher = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, *command[1:]] if processes > 1 else command


class Contestant:
    """A process that trains for an epoch whenever asked. It starts when first asked: no two ever run at a time."""

    def __init__(self, name, command, options):
        self.name, self.command, self.options, self.epochs = name, command, options, []
        self.log = tempfile.TemporaryFile("w+")
        self.process = None

    def epoch(self):
        """Lets it train for one epoch; returns its metrics."""
        if self.process is None:
            environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            self.process = subprocess.Popen(
                [*self.command, json.dumps(self.options)], text=True, cwd=ROOT, env=environment, stderr=self.log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        else:
            print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                self.epochs.append(json.loads(line))
                return self.epochs[-1]
        self.log.seek(0)
        sys.exit(f"{self.name} ended early:\n{self.log.read()[-3000:]}")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def make_model(name, folder):
    """The folder of a model of MODELS; those with random weights are made if they are not there."""
    if name == "emoji":
        return "models/emoji"
    if name in MODELS:
        from scripts.make_random_model import make_random_model

        path = Path(folder, name).absolute()
        return str(path) if (path / "model_index.json").exists() else make_random_model(name, path)
    return name


def make_trl(folder):
    """The Python of a virtual environment with trl 0.23.1 and, through a .pth file, this environment's packages."""
    python = Path(folder, "bin/python").absolute()
    if not Path(folder, "ready").exists():
        print(f"making {folder} with trl 0.23.1", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(site, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "trl==0.23.1"], check=True)
        Path(folder, "ready").touch()
    return str(python)


# ------------------------------------------------------------------------------------------------------ what it costs
def count_flops(model, options):
    """(sampling, training) floating-point operations of an image in an epoch, without VAE and text encoder: counted on
    the UNet without data ("meta"), forward, and forward and backward."""
    from ddpo.models import Conditions
    from ddpo.policy import load_policy

    policy = load_policy(model, options["lora_rank"], "fp32", "cpu")
    policy.denoiser.to("meta")
    latents = torch.empty(1, *policy.latent_shape(), device="meta")
    states = Conditions({k: v.to("meta") for k, v in policy.embed(["a cat"]).tensors.items()})
    step = torch.ones(1, device="meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.forward(latents, step, states)
    with FlopCounterMode(display=False) as both:
        policy.forward(latents, step, states).sum().backward()
    passes = options["sample.num_steps"] * (1 + (options["sample.guidance_scale"] != 1))
    return forward.get_total_flops() * passes, both.get_total_flops() * passes


def matmul_ceiling(precision, threads, size=0):
    """Floating-point operations a second of a large square matrix product: median of 10, after 3. On a CPU a second of
    one core."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    size = size or (8192 if device.type == "cuda" else 1536)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            a @ b
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.process_time()
            a @ b
            seconds.append(time.process_time() - start)
    return 2 * size**3 / float(np.median(seconds[3:]))


def hardware(threads):
    """One line: what it ran on."""
    on_gpu = torch.cuda.is_available()
    return f"{processor()}, {'' if on_gpu else f'{threads} threads, '}torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------------------ reports
def spread(values):
    """ "median (smallest-largest)" with three digits."""
    return f"{np.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def summarise(contestant, flops, ceiling):
    """The counted epochs' images per second, part by part; memory; medians' share of the matrix-product ceiling."""
    images, epochs = contestant.options["sample.images_per_epoch"], contestant.counted
    row = {"name": contestant.name, "images_per_epoch": images, "peak_memory_gb": epochs[-1].get("peak_memory_gb", 0)}
    row |= {key: epochs[-1][key] / images for key in ("sampled_rows", "trained_rows")}
    for part in PARTS:
        row[part.replace("seconds", "images_per_second")] = [images / e[part] for e in epochs if e.get(part)]
    speeds = row["images_per_second" if torch.cuda.is_available() else "cpu_images_per_second"]
    row["ceiling_share"] = sum(flops) * float(np.median(speeds)) / ceiling
    return row


def table(rows):
    """The rows as a Markdown table. Speeds relative to the first row's are taken epoch by epoch."""
    parts = ["sampling", "rewards", "training", "epoch", "a CPU core"]
    columns = [*(f"{part}, images/s" for part in parts), "first / this", "by CPU time", "share of ceiling", "peak GB"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        speeds = [row[part.replace("seconds", "images_per_second")] for part in PARTS]
        for key, ratio in (("images_per_second", "first_to_this"), ("cpu_images_per_second", "first_to_this_cpu")):
            row[ratio] = [first / this for first, this in zip(rows[0][key], row[key])]
            speeds.append(row[ratio])
        cells = [row["name"], *(spread(values) if values else "-" for values in speeds)]
        cells += [f"{row['ceiling_share']:.0%}", f"{row['peak_memory_gb']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    rows_seen = {row["name"]: row["sampled_rows"] + row["trained_rows"] for row in rows}
    if len(set(rows_seen.values())) > 1:
        lines.append(f"\nNot the same arithmetic: an image's passes through the UNet are {rows_seen}")
    return "\n".join(lines)


def compare(contestants, repetitions, warmup):
    """Epochs in turn: A B C A B C ... Sets each contestant's `counted` epochs."""
    for turn in range(warmup + repetitions):
        for c in contestants:
            metrics = c.epoch()
            print(f"{'warm-up' if turn < warmup else f'epoch {turn - warmup}'}: {c.name} {metrics['seconds']:.2f} s "
                  f"for {c.options['sample.images_per_epoch']} images", flush=True)  # fmt: skip
    for c in contestants:
        c.counted = c.epochs[warmup:]


def parse(changes):
    """["train.batch_size=4"] -> {"train.batch_size": 4}; values as Python or JSON write them, else strings."""
    options = {}
    for key, value in (change.split("=", 1) for change in changes):
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def as_post(options):
    """The sizes that trl's post recommends for one GPU: batches of 6 images sampled, updates of 3 images trained."""
    images = max(24, options["sample.images_per_epoch"] // 24 * 24)
    return options | {
        "sample.images_per_epoch": images, "sample.batch_size": 6, "train.batch_size": 3,
        "train.updates_per_epoch": images // 3,
    }  # fmt: skip


SCALING = {  # images, steps, processes -> what it is compared with
    (16, 10, 1): (16, 10, 1), (64, 10, 1): (16, 10, 1), (256, 10, 1): (16, 10, 1), (64, 10, 2): (64, 10, 1),
    (16, 50, 1): (16, 10, 1),
}  # fmt: skip


def scaling_setups(command, base):
    """[(name, command, options)] of SCALING: more images, with more updates of the same size; more steps; processes,
    with as large a batch in each."""
    per_update = base["sample.images_per_epoch"] // base["train.updates_per_epoch"]
    setups = []
    for images, steps, processes in SCALING:
        updates = images // (per_update * processes)
        own = base | {"sample.images_per_epoch": images, "train.updates_per_epoch": updates}
        own |= {"sample.batch_size": per_update, "train.batch_size": per_update}
        own |= {"sample.num_steps": steps, "processes": processes}
        name = f"{images} images, {steps} steps, {processes} process{'es' * (processes > 1)}"
        setups.append((name, launch(command, processes), own))
    return setups


def scaling_table(contestants):
    """Milliseconds that a step of an image costs, sampled and trained; relative to what SCALING compares it with."""
    lines = ["| | ms a step of an image | relative, by the clock | by CPU time |", "|---|---|---|---|"]
    cost = {}
    for case, c in zip(SCALING, contestants):
        epochs, work = c.counted, case[0] * case[1]
        cost[case] = [[1e3 * e[key] / work for e in epochs] for key in ("seconds", "cpu_seconds")]
        ratios = [[a / b for a, b in zip(*both)] for both in zip(cost[case], cost[SCALING[case]])]
        lines.append(f"| {c.name} | {spread(cost[case][0])} | {spread(ratios[0])} | {spread(ratios[1])} |")
    return "\n".join(lines), {c.name: values for c, values in zip(contestants, cost.values())}


def memory_over_epochs(command, base, folder, epochs=200):
    """GB that a process holds after 20, 40, ... epochs of 8 images."""
    options = {"sample.images_per_epoch": 8, "train.updates_per_epoch": 1, "sample.num_steps": 2, "num_epochs": epochs}
    contestant = Contestant("memory", command, base | options | {"run_dir": str(Path(folder, "memory"))})
    held = {epoch: contestant.epoch()["memory_gb"] for epoch in range(1, epochs + 1)}
    contestant.end()
    return {epoch: gb for epoch, gb in held.items() if epoch % 20 == 0}


def run_contestants(setups, folder, repetitions, warmup, profile=False):
    """Starts them, lets them train in turn and ends them. Returns them, and {name: profile} of one more epoch."""
    contestants = []
    for i, (name, command, options) in enumerate(setups):
        options = options | {"run_dir": str(Path(folder, str(i)))}
        options |= {"profile": 1} if profile and "scripts.dev.bench_trl" not in command else {}
        contestants.append(Contestant(name, command, options))
    compare(contestants, repetitions, warmup)
    profiles = {c.name: c.epoch()["profile"] for c in contestants if "profile" in c.options}
    for c in contestants:
        c.end()
    return contestants, profiles


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help=f"{', '.join(MODELS)}, or a folder")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of config/base.py")
    other = (
        "a contestant with these options besides; checkout=FOLDER is another commit's train.py, processes=N that many"
    )
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="KEY=VALUE", help=other)
    parser.add_argument("--against", choices=["trl"])
    parser.add_argument("--repetitions", type=at_least(1), default=3, help="epochs counted")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="epochs not counted")
    parser.add_argument("--threads", type=at_least(0), default=0, help="on a CPU; 0: all cores")
    parser.add_argument("--profile", action="store_true", help="the ten costliest operations of one more epoch")
    parser.add_argument("--scaling", action="store_true", help="more images, steps, processes, and epochs")
    parser.add_argument("--json", help="file to write everything to")
    parser.add_argument("--draw", metavar="FILE", help="draws a --json file, and does nothing else")
    parser.add_argument("--models_folder", default="runs/bench/models")
    parser.add_argument("--trl_folder", default="runs/bench/trl")
    args = parser.parse_args()

    if args.draw:
        return draw(args.draw)
    from ddpo.hardware import cpu_cores

    threads = args.threads or cpu_cores()
    model = make_model(args.model, args.models_folder)
    epochs = args.warmup + args.repetitions + args.profile
    base = {**DEFAULTS, "model": model, "threads": threads, "num_epochs": epochs, "precision": args.precision}
    base |= parse(args.set)
    command = [sys.executable, "-m", "scripts.dev.bench", "worker"]
    setups = [("ours", command, base)]
    for changes in args.variant:
        options = base | parse(changes)
        setups.append((" ".join(changes), launch(command, options.get("processes", 1)), options))
    if args.against:
        trl = [make_trl(args.trl_folder), "-m", "scripts.dev.bench_trl"]
        setups += [("trl, batches as ours", trl, base), ("trl, batches as its post", trl, as_post(base))]
    machine = hardware(threads)
    result = {"command": sys.argv[1:], "commit": commit(), "hardware": machine, "options": base | {"model": args.model}}
    counted = f"median (smallest-largest) of {args.repetitions} epochs after {args.warmup}"
    where = f"{args.model}, {machine}, commit {result['commit']}; {counted}"
    with tempfile.TemporaryDirectory() as folder:
        if args.scaling:
            setups = scaling_setups(command, base)
            contestants, _ = run_contestants(setups, folder, args.repetitions, args.warmup)
            report, result["ms_per_image_step"] = scaling_table(contestants)
            print(f"\n{where}\n\n{report}\n")
            result["memory_gb"] = memory_over_epochs(command, base, folder)
            print("GB held after epochs: " + ", ".join(f"{k}: {v:.3f}" for k, v in result["memory_gb"].items()))
            return write(args.json, result)
        contestants, profiles = run_contestants(setups, folder, args.repetitions, args.warmup, args.profile)
    ceiling, flops = matmul_ceiling(args.precision, threads), count_flops(model, base)
    rows = [summarise(c, flops, ceiling) for c in contestants]
    for name, profile in profiles.items():
        print(f"\n{name}\n{profile}")
    print(
        f"\n{where}\nmatrix products: {ceiling / 1e12:.3g} TFLOP/s ({args.precision}); an image of an epoch: "
        f"{flops[0] / 1e12:.4g} TFLOP sampling, {flops[1] / 1e12:.4g} training, in {rows[0]['sampled_rows']:g} and "
        f"{rows[0]['trained_rows']:g} passes through the UNet\n\n{table(rows)}"
    )
    result |= {"matmul_flops": ceiling, "flops_per_image": flops, "rows": rows, "profiles": profiles}
    write(args.json, result)


def draw(path):
    """Saves, beside a --json file and under its name, an image of it: images per second by the clock and, from a CPU's
    file, of a CPU core's own time; medians, in the range of the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(Path(path).read_text())
    panels = {"images_per_second": "images per second"}
    if "threads" in result["hardware"]:
        panels["cpu_images_per_second"] = "images per CPU second"
    names = [textwrap.fill(row["name"], 48) for row in result["rows"]]
    size = (3.2 + 2.4 * len(panels), 0.9 + 0.35 * len(names))
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, (key, label) in zip(grid.flat, panels.items()):
        speeds = [row[key] for row in result["rows"]]
        medians = np.array([np.median(values) for values in speeds])
        errors = [medians - [min(values) for values in speeds], [max(values) for values in speeds] - medians]
        axes.barh(names, medians, xerr=errors, color="C0", ecolor="0.3")
        axes.set_xlabel(label)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].invert_yaxis()
    figure.suptitle(result["hardware"], fontsize=9)
    figure.savefig(Path(path).with_suffix(".png"), dpi=150)


def write(path, result):
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        run_script(main)
