"""Measures on this machine what can only be computed elsewhere, and writes one JSON to be attached to an issue:

    python -m scripts.gpu_check --output gpu_check.json

Random weights of Stable Diffusion 1.5's size (--size), since speed and memory do not depend on their values.
--sections, in this order:

    ceilings      TFLOP/s of a large matrix product, GB/s of a copy
    lora          a denoising step and a training pass in bf16: milliseconds, memory, |ratio - 1|; at the size nearest
                  to 8 in every layout of activations, with kernels, waits and FLOPs, and the kernels and operations
                  that take longest; in the fastest of them with cuDNN's attention, and at the other sizes
    graphs        the same as CUDA graphs, which cost the host nothing
    full          full finetuning in fp32, tf32 and bf16: the same, and the angle of its gradient to that in fp32
    ratio_error   |ratio - 1| before any update and the kernels of attention, per precision (--precisions) and attention
                  backend
    compile       torch.compile; minutes, and not by default

Each result is printed and saved as soon as it is there; one that fails says why and the others go on; after --seconds
no further one is begun. Without a GPU it runs to its end with --size tiny, which shows no more than that it runs.
"""

import argparse
import contextlib
import copy
import gc
import json
import tempfile
import time
import warnings
from itertools import pairwise
from statistics import median

import diffusers
import torch
import transformers
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from config.base import get_config
from ddpo import group_norm
from ddpo.errors import InputError, at_least, check_output, run_script
from ddpo.hardware import peak_memory_gb
from ddpo.likelihood import Rollout
from ddpo.losses import ALGORITHMS
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import PRECISIONS, load_policy
from scripts.make_random_model import SIZES, make_random_model
from scripts.provenance import commit, processor

BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTION = ("attention", "fmha", "flash", "sdpa")  # in kernels' names
COMPARED = (0, 3, 5)  # steps whose gradients are compared
STEPS = (2, 6)  # denoising steps of short trajectories
TIMED = 12  # denoising steps of which each is timed
REPEATS, LONG = 3, 1.0  # LONG: seconds
LAYOUTS = {  # of convolutions' weights, and whether group norms are computed by ddpo/group_norm.py
    "contiguous": (torch.contiguous_format, False),
    "channels_last": (torch.channels_last, False),
    "channels_last, own norms": (torch.channels_last, True),
}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device):
    """Of the fastest of REPEATS calls (fewer if they take long), after one to warm up."""
    function()
    taken = []
    while len(taken) < REPEATS and sum(taken) < LONG:
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def ceilings(device):
    """TFLOP/s of a large matrix product per precision, and GB/s of a copy, bytes read and written."""
    n = 8192 if device.type == "cuda" else 512
    result = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, 0), ("tf32", torch.float32, 1), ("fp32", torch.float32, 0)):
        torch.backends.cuda.matmul.allow_tf32 = bool(tf32)
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        result[f"{name}_tflops"] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b, device) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    result["copy_gb_s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    return result


class Work:
    """Sampling and training of `batch_size` images by a policy, as train.py does both."""

    def __init__(self, policy, batch_size):
        self.policy, self.batch_size, self.config = policy, batch_size, get_config()
        self.prompts = [f"an image of {i}" for i in range(batch_size)]

    def sample(self, steps):
        """Trajectories of so many steps, and the images decoded."""
        self.policy.set_timesteps(steps)
        shape = (steps + 1, *self.policy.latent_shape())
        return sample_with_logprob(
            self.policy, self.prompts, lambda i: draw_noise(shape, 0, 0, i), self.config.sample.guidance_scale,
            self.policy.noise_level(self.config.sample), keep_steps=True,
        )  # fmt: skip

    def network(self):
        """A function that passes through the network as a denoising step does, without gradients."""
        rows, device = 2 * self.batch_size, self.policy.device
        latents = torch.randn(rows, *self.policy.latent_shape(), device=device)
        t, embeds = torch.full((rows,), 500, device=device), self.policy.embed([""] * rows)
        return torch.no_grad()(lambda: self.policy.forward(latents, t, embeds))

    def rollout(self, steps):
        """A function of a step that trains on it, adding to the gradients, and returns |ratio - 1| (B,)."""
        algorithm = ALGORITHMS["ddpo_is"]
        everyone = torch.arange(self.batch_size, device=self.policy.device)
        trajectories = self.sample(steps)
        rollout = Rollout(self.policy, self.config, algorithm, 0, everyone.tolist(), self.prompts, trajectories)
        advantages = torch.linspace(-1, 1, self.batch_size, device=self.policy.device)

        def train(step):
            terms = rollout.score(everyone, torch.full_like(everyone, step))
            loss, _ = algorithm.loss(terms, advantages, self.config.train)
            (loss.sum() / self.batch_size).backward()
            return terms.ratio_error()

        return train


def set_precision(precision):
    """Of networks in float32: fp32 or tf32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def set_layout(policy, layout):
    """Of the weights of the denoiser's convolutions, and of their masters."""
    memory_format, group_norm.enabled = LAYOUTS[layout]
    for p in {*policy.denoiser.parameters(), *policy.trainable_parameters()}:
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=memory_format)


def norms(device):
    """Of a group norm with SiLU, its gradient included, in bf16 with channels last: milliseconds by torch and by
    ddpo/group_norm.py, and the relative errors of the latter's output and gradients, the reference being float64."""
    result = {}
    if device.type != "cuda":
        return "needs a GPU"
    for shape in ((16, 320, 64, 64), (16, 1920, 32, 32), (3, 1280, 8, 8)):
        norm = torch.nn.GroupNorm(32, shape[1], device=device, dtype=torch.bfloat16)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        x, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) + i for i in (1, 0))
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))

        def gradient(function, norm, x, dy):
            x = x.detach().requires_grad_()
            y = function(norm, x)
            return y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)

        def plain(norm, x):
            return torch.nn.functional.silu(torch.nn.GroupNorm.forward(norm, x))

        exact = gradient(plain, copy.deepcopy(norm).double(), x.double(), dy.double())
        for name, function in (("torch", plain), ("own", lambda norm, x: group_norm.group_norm(norm, x, True))):
            found = gradient(function, norm, x, dy)
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact)]
            ms = 1e3 * seconds(lambda: [gradient(function, norm, x, dy) for _ in range(10)], device) / 10  # noqa: B023
            with torch.no_grad():
                forward_ms = 1e3 * seconds(lambda: [function(norm, x) for _ in range(10)], device) / 10  # noqa: B023
            result[f"{name}, {shape}"] = {"errors": errors, "ms": ms, "forward_ms": forward_ms}
    return result


def exactness(policy, batch_size):
    """Per attention backend: the largest |ratio - 1| before any update of each step of a batch, and the kernels of
    attention without and with gradients. torch's own choice comes twice, to tell it from a first call's."""
    result, forward = {}, policy.forward
    steps = STEPS[policy.device.type == "cuda"]
    for name, backend in {**BACKENDS, "default, again": None}.items():

        def with_backend(*inputs, backend=backend):  # of the UNet alone
            with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                return forward(*inputs)

        policy.forward = with_backend
        try:
            work = Work(policy, batch_size)
            train = work.rollout(steps)
            errors = torch.stack([train(step).max() for step in range(steps)])
            result[name] = {"ratio_errors": errors.tolist()}
            if backend is None and policy.device.type == "cuda":
                for key, call in (("sampling", work.network()), ("training", lambda train=train: train(0))):
                    kernels = profile_kernels(call, policy.device, most=10**9)["longest_ms"]
                    result[name][key] = [k for k in kernels if any(word in k.lower() for word in ATTENTION)]
        except RuntimeError as error:
            result[name] = f"not available: {str(error).splitlines()[0]}"
    del policy.forward  # the class's own again
    clear_gradients(policy)
    return result


def clear_gradients(policy):
    for p in policy.trainable_parameters():
        p.grad = None


def gradients(policy, trajectories, work):
    """Yields, for each step COMPARED, the gradient of its log-probs weighted by advantages: a list of tensors."""
    indices = list(range(work.batch_size))
    rollout = Rollout(policy, work.config, ALGORITHMS["ddpo_is"], 0, indices, work.prompts, trajectories)
    everyone = torch.arange(work.batch_size, device=policy.device)
    weights = torch.linspace(-1, 1, work.batch_size, device=policy.device)
    for step in COMPARED:
        terms = rollout.score(everyone, torch.full_like(everyone, step))
        (terms.log_prob * weights).sum().backward()
        yield [p.grad for p in policy.trainable_parameters()]
        clear_gradients(policy)


def angles(gradient, reference):
    """Per step: cosine of two gradients, the ratio of their norms, and the smallest cosine of a tensor among those with
    at least a thousandth of the norm."""
    result = {}
    for step, ours, exact in zip(COMPARED, gradient, reference, strict=True):
        dots = torch.stack([(a.double() * b.double()).sum() for a, b in zip(ours, exact)])
        ours, exact = (torch.stack([a.double().norm() for a in tensors]) for tensors in (ours, exact))
        large = exact > 1e-3 * exact.norm()
        result[f"step {step}"] = {
            "cosine": float(dots.sum() / ours.norm() / exact.norm()),
            "norm": float(ours.norm() / exact.norm()),
            "least_cosine_of_a_tensor": float((dots / ours / exact)[large].min()),
        }
    return result


def count_waits(function):
    """How often `function` waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profile_kernels(function, device, most=12):
    """Of a call: its kernels (on a CPU its operations), their milliseconds, and of the `most` kernels and operations
    that take longest [milliseconds, calls]."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        function()
        synchronise(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [e for e in profiler.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    by_name = {}
    for event in kernels:
        name = event.name
        for noise in ("void ", "at::native::", "(anonymous namespace)::", "at::cuda::"):
            name = name.replace(noise, "")
        total, calls = by_name.get(name[:150], (0, 0))
        by_name[name[:150]] = total + event.time_range.elapsed_us() / 1e3, calls + 1
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = {
        e.key: (getattr(e, time_of) / 1e3, e.count) for e in profiler.key_averages() if e.device_type == DeviceType.CPU
    }

    def longest(times):
        return {k: [round(v[0], 3), v[1]] for k, v in sorted(times.items(), key=lambda item: -item[1][0])[:most]}

    return {
        "kernels": len(kernels), "kernel_ms": sum(total for total, _ in by_name.values()),
        "longest_ms": longest(by_name), "operations_ms": longest(operations),
    }  # fmt: skip


def sampling_ms(work):
    """Milliseconds of a denoising step, the median of those from one pass through the network to the next by the
    device's own clock, and of all else: a difference of two runs would be one of decoding's seconds."""
    policy, device, marks = work.policy, work.policy.device, []
    forward = policy.forward

    def marked(*inputs):
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        return forward(*inputs)

    synchronise(device)
    start, policy.forward = time.perf_counter(), marked
    try:
        work.sample(TIMED)
    finally:
        del policy.forward  # the class's own again
    synchronise(device)
    total = 1e3 * (time.perf_counter() - start)
    if device.type == "cuda":
        steps = [a.elapsed_time(b) for a, b in pairwise(marks)]
    else:
        steps = [1e3 * (b - a) for a, b in pairwise(marks)]
    return median(steps), total - TIMED * median(steps)


def cost(policy, batch_size):
    """What a denoising step and a training pass of `batch_size` images cost, both guided; images a second of as
    many steps as config/base.py has, all of them trained on."""
    device, work = policy.device, Work(policy, batch_size)
    work.sample(STEPS[0])
    peak_memory_gb(device)  # of this batch size alone from here on
    result = dict(zip(("sample_ms", "decode_ms"), sampling_ms(work)))
    train = work.rollout(STEPS[0])
    result["train_ms"] = 1e3 * seconds(lambda: train(0), device)
    result["memory_gb"] = peak_memory_gb(device)
    total_ms = work.config.sample.num_steps * (result["sample_ms"] + result["train_ms"]) + result["decode_ms"]
    result["images_per_second"] = 1e3 * batch_size / total_ms
    result["ratio_error"] = max(float(train(step).max()) for step in range(STEPS[0]))
    clear_gradients(policy)
    return result


def details(policy, batch_size):
    """Kernels, waits for the GPU and FLOPs of a denoising step and of a training pass."""
    device, work = policy.device, Work(policy, batch_size)
    samples, train = [lambda n=n: work.sample(n) for n in STEPS], work.rollout(STEPS[0])
    train(0)  # which makes the gradients
    counter, result = FlopCounterMode(display=False), {}
    with counter:
        train(0)
    result["train_tflop"] = counter.get_total_flops() / 1e12
    if device.type == "cuda":
        few, many = map(count_waits, samples)
        result["sample_waits"] = (many - few) / (STEPS[1] - STEPS[0])
        result["train_waits"] = count_waits(lambda: train(0))
    few, many = (profile_kernels(lambda n=n: work.sample(n), device, most=10**9) for n in (2, 3))
    for key in ("kernels", "kernel_ms"):
        result[f"sample_{key}"] = many[key] - few[key]
    for key in ("longest_ms", "operations_ms"):
        step = {k: ms - few[key].get(k, (0, 0))[0] for k, (ms, _) in many[key].items()}
        result[f"sample_{key}"] = {k: round(v, 3) for k, v in sorted(step.items(), key=lambda item: -item[1])[:12]}
    result |= {f"train_{key}": value for key, value in profile_kernels(lambda: train(0), device).items()}
    clear_gradients(policy)
    return result


def graphs(policy, batch_size):
    """Milliseconds of a guided pass through the network, and of a training pass, as CUDA graphs and without; and
    whether the former's outputs are the same."""
    device, work = policy.device, Work(policy, batch_size)
    if device.type != "cuda":
        return "needs a GPU"
    train, result = work.rollout(STEPS[0]), {}
    for name, function in (("sample", work.network()), ("train", lambda: train(0))):
        result[f"{name}_ms"] = 1e3 * seconds(function, device)
        plain, stream = function(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function()
        result[f"{name}_graph_ms"] = 1e3 * seconds(graph.replay, device)
        result[f"{name}_same"] = torch.equal(output, plain)
        graph = output = None
        torch.cuda.empty_cache()
    clear_gradients(policy)
    return result


def lora(load, report, sizes, middle):
    """All layouts at the middle size; the fastest one at the others and in what comes after."""
    times = {}
    report("norms", norms, load.device)
    for layout in LAYOUTS if load.device.type == "cuda" else [load.layout]:
        policy = load(4, "bf16", layout)
        found = report(f"LoRA 4, bf16, {layout}, batch {middle}", cost, policy, middle)
        report(f"LoRA 4, bf16, {layout}, batch {middle}, details", details, policy, middle)
        times[layout] = found["train_ms"] + found["sample_ms"] if found else float("inf")
    load.layout = min(times, key=times.get)
    if load.device.type == "cuda":
        policy = load(4, "bf16")
        torch.backends.cuda.enable_cudnn_sdp(True)  # which load_policy switches off, see there
        report(f"LoRA 4, bf16, cuDNN's attention, batch {middle}", cost, policy, middle)
        report(f"LoRA 4, bf16, cuDNN's attention, batch {middle}, details", details, policy, middle)
        torch.backends.cuda.enable_cudnn_sdp(False)
    for size in sizes:
        if size != middle:
            report(f"LoRA 4, bf16, {load.layout}, batch {size}", cost, load(4, "bf16"), size)


def cuda_graphs(load, report, sizes, middle):
    for size in (1, middle):
        report(f"LoRA 4, bf16, CUDA graphs, batch {size}", graphs, load(4, "bf16"), size)


def full(load, report, sizes, middle):
    policy, exact = load(0, "fp32"), []
    for precision in ("fp32", "tf32"):
        set_precision(precision)
        report(f"full, {precision}, batch {middle}", cost, policy, middle)
    set_precision("fp32")
    work = Work(policy, min(4, middle))
    trajectories = work.sample(STEPS[1])

    def in_fp32():
        exact.extend(gradients(policy, trajectories, work))
        return {"norms": [float(torch.stack([g.norm() for g in tensors]).norm()) for tensors in exact]}

    report("gradient in fp32", in_fp32)
    report("gradient in fp32, again", lambda: angles(gradients(policy, trajectories, work), exact))
    set_precision("tf32")
    report("gradient in tf32", lambda: angles(gradients(policy, trajectories, work), exact))
    policy = work.policy = None
    policy = load(0, "bf16")
    policy.set_timesteps(STEPS[1])
    report("gradient in bf16", lambda: angles(gradients(policy, trajectories, work), exact))
    exact.clear()
    report(f"full, bf16, batch {middle}", cost, policy, middle)
    if load.device.type == "cuda":
        report(f"full, bf16, batch {middle}, details", details, policy, middle)


def ratio_errors(load, report, sizes, middle):
    for precision in load.precisions:
        policy = load(4, "fp32" if precision == "tf32" else precision)
        if precision == "tf32":
            set_precision(precision)
        report(f"ratio_error, {precision}", exactness, policy, min(2, middle))
        policy = None


def compiled(load, report, sizes, middle):
    def compiled_cost():
        policy = load(4, "bf16")
        policy.compile(2 * middle)
        return cost(policy, middle)

    report(f"LoRA 4, bf16, compiled, batch {middle}", compiled_cost)


SECTIONS = {
    "ceilings": lambda load, report, sizes, middle: report("ceilings", ceilings, load.device),
    "lora": lora, "graphs": cuda_graphs, "full": full, "ratio_error": ratio_errors, "compile": compiled,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd15", choices=SIZES)
    parser.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 8, 32])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS)[:-1], choices=SECTIONS)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32", "tf32", "fp16"], choices=PRECISIONS)
    parser.add_argument("--seconds", type=at_least(1), default=1200, help="after which nothing further is begun")
    parser.add_argument("--output", default="gpu_check.json")
    args = parser.parse_args()
    check_output(args.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.size.startswith("tiny"):
        raise InputError(f"no GPU: {args.size} would take hours here, --size tiny shows that this script runs")
    middle = min(args.batch_sizes, key=lambda size: abs(size - 8))
    result = {
        "device": processor(), "commit": commit(), "size": args.size, "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__, "seconds": {},
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)
    begun, held = time.perf_counter(), {}

    def report(name, function, *inputs):
        start, found = time.perf_counter(), None
        try:
            if start - begun > args.seconds:
                raise InputError(f"not begun after {args.seconds} s")
            result[name] = found = function(*inputs)
        except Exception as error:  # out of memory, an unsupported operation: the rest is worth having
            result[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        print(f"{name} ({result['seconds'][name]} s): {json.dumps(result[name], indent=1)}", flush=True)
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def load(lora_rank, precision, layout=None):
        """The policy that was loaded last, if it is of this kind, else a new one in its place."""
        if (lora_rank, precision) not in held:
            start = time.perf_counter()
            held.clear()
            if device.type == "cuda":
                gc.collect()  # modules refer to themselves
                torch.cuda.empty_cache()
            held[lora_rank, precision] = load_policy(folder, lora_rank, precision, device)
            print(f"loaded rank {lora_rank}, {precision} ({time.perf_counter() - start:.1f} s)", flush=True)
        set_layout(held[lora_rank, precision], layout or load.layout)
        return held[lora_rank, precision]

    load.device, load.layout, load.precisions = device, "channels_last", args.precisions
    with tempfile.TemporaryDirectory() as folder:
        try:
            with device:  # whose random numbers come faster
                make_random_model(args.size, folder)
        except Exception as error:
            print(f"no model could be made on the GPU: {error}", flush=True)
            make_random_model(args.size, folder)
        print(f"made a model ({time.perf_counter() - begun:.1f} s)", flush=True)
        for name in (name for name in SECTIONS if name in args.sections):
            try:
                SECTIONS[name](load, report, args.batch_sizes, middle)
            except Exception as error:
                report(name, raise_, error)


def raise_(error):
    raise error


if __name__ == "__main__":
    run_script(main)
