"""Kernels, bytes and FLOPs of a guided denoising step and of a training pass on a GPU, counted without one:

    python -m scripts.dev.roofline --size sd15 --batch_size 8 --lora_rank 4 --precision bf16

The policy's own code runs on tensors without data. Each operation is taken for as many kernels as CUDA launches for it,
which read their inputs and write their outputs once; attention and group norms are those that run on a GPU. A kernel
takes as long as its bytes or its FLOPs at the rates below, whichever is longer, and LAUNCH at least. So the counts are
near the profiler's, and the time is what a GPU could do at best: docs/gpu.md has both. VAE, text encoder, reward and
optimizer are left out.
"""

import argparse
import contextlib
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.base import get_config
from ddpo.errors import at_least, run_script
from ddpo.fewer_kernels import use_fewer_kernels
from ddpo.likelihood import Rollout
from ddpo.losses import ALGORITHMS
from ddpo.models import Conditions, StableDiffusion
from ddpo.pipeline_logprob import Trajectories, predict_noise
from ddpo.policy import PRECISIONS, Policy
from scripts.make_random_model import SIZES, make_scheduler, make_unet

# Assumed of an H100 SXM: FLOP/s by its data sheet, the share of it that large kernels reach, and bytes/s, 85% of it.
PEAK = {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}
REACHED = {"product": 0.6, "convolution": 0.5, "attention": 0.35, "attention, gradient": 0.3}
BANDWIDTH = 0.85 * 3.35e12
LAUNCH = 2e-6  # s: no kernel is shorter
KERNELS = {  # per operation, where it is not 1; LoRA's frozen norms have no gradients of their weights
    "native_group_norm": 3, "native_group_norm_backward": 4, "empty": 0, "empty_like": 0, "empty_strided": 0,
    "new_empty": 0, "new_empty_strided": 0, "lift_fresh": 0, "_unsafe_view": 0, "detach": 0,
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


def size(tensor):
    """Bytes that reading it takes; an expanded one's are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Count(TorchDispatchMode):
    """Of what runs within: {kind of kernel: number}, and bytes, FLOPs and seconds alike."""

    def __init__(self, precision):
        super().__init__()
        self.precision = precision
        self.kernels, self.bytes, self.flops, self.seconds = Counter(), Counter(), Counter(), Counter()

    def add(self, kind, kernels, nbytes, flops=0, rate=None):
        self.kernels[kind] += kernels
        self.bytes[kind] += nbytes
        self.flops[kind] += flops
        busy = flops / (PEAK[self.precision] * REACHED[rate]) if flops else 0
        self.seconds[kind] += max(nbytes / BANDWIDTH, busy, LAUNCH * kernels)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function._schema.name.removeprefix("aten::")
        if function.is_view or not KERNELS.get(name, 1) or not function._schema.name.startswith("aten::"):
            return out
        inputs, outputs = ([x for x in tree_leaves(xs) if isinstance(x, torch.Tensor)] for xs in ((args, kwargs), out))
        nbytes = sum(map(size, inputs + outputs))
        if name == "convolution":
            x, weight, bias = args[:3]
            self.add(name, 1, size(x) + size(weight) + size(out), 2 * out.numel() * weight[0].numel(), "convolution")
            self.layout(x)
            if bias is not None:  # a kernel of its own
                self.add("convolution, bias", 1, 2 * size(out))
        elif name == "convolution_backward":
            dy, x, weight, needed = *args[:3], args[-1]
            for kind, gradient in zip(("input", "weights"), needed):
                if gradient:
                    flops = 2 * dy.numel() * weight[0].numel()
                    self.add(f"convolution, gradient of {kind}", 1, size(dy) + size(weight) + size(x), flops,
                             "convolution")  # fmt: skip
            self.layout(dy)
            if needed[2]:
                self.add("convolution, gradient of bias", 1, size(dy))
        elif name in PRODUCTS:
            a = args[1] if name.startswith(("add", "badd")) else args[0]
            self.add("product", 1, nbytes, 2 * outputs[0].numel() * a.shape[-1], "product")
        else:
            if name == "native_group_norm" and not args[0].is_contiguous():
                self.add("copy for a norm", 1, 2 * size(args[0]))
            self.add(name, KERNELS.get(name, 1), nbytes - (size(args[0]) if name == "copy_" else 0))
        return out

    def layout(self, x):
        """Convolutions in half precision want channels last."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            self.add("copy for a convolution", 1, 2 * size(x))


def counted(count, kind, forward, backward):
    """A function that returns something like its first input and counts as the kernels of a fused operation: forward
    and backward, given the inputs, are (kernels, bytes, FLOPs, rate)."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            count().add(kind, *forward(*inputs))
            return torch.empty_like(inputs[0])

        @staticmethod
        def backward(ctx, gradient):
            count().add(f"{kind}, gradient", *backward(*ctx.saved_tensors))
            return tuple(torch.empty_like(x) if need else None
                         for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad))  # fmt: skip

    return Fused.apply


class Simulated:
    """A policy of random weights without data, and what it counts."""

    def __init__(self, name, lora_rank, precision, batch_size):
        self.batch_size, self.precision, self.count, self.config = batch_size, precision, None, get_config()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            unet = make_unet(name).requires_grad_(not lora_rank)
            if lora_rank:
                targets = self.config.lora_targets.split(",")
                unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
        self.own_norms = PRECISIONS[precision] is not None  # ddpo/group_norm.py
        with self.running():
            for module in unet.modules():
                for key, p in module._parameters.items():
                    if p is not None:
                        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
                        p = torch.nn.Parameter(torch.empty(p.shape).to(memory_format=layout), p.requires_grad)
                        module._parameters[key] = p
            use_fewer_kernels(unet)
            factor = 2 ** (len(SIZES[name]["vae"]["block_out_channels"]) - 1)
            pipe = SimpleNamespace(unet=unet, vae=None, scheduler=make_scheduler(), vae_scale_factor=factor)
            self.policy = Policy(pipe, StableDiffusion(pipe, "cpu"), "cpu", precision, lora_rank)
            self.policy.set_timesteps = pipe.scheduler.set_timesteps
            for p in self.policy.trainable_parameters():
                p.grad = torch.empty_like(p)
        pipe.scheduler.set_timesteps(self.config.sample.num_steps)
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        self.latents = (batch_size, 4, side, side)
        self.policy.embed = lambda prompts: Conditions({"states": torch.empty(len(prompts), 77, width)})

    @contextlib.contextmanager
    def running(self):
        """Within it, tensors have no data, and attention and norms are those of a GPU."""

        def attention_flops(query, key):
            return 2 * query.numel() * key.shape[-2] * 2

        attention = counted(
            lambda: self.count, "attention",
            lambda q, k, v: (1, 2 * size(q) + size(k) + size(v), attention_flops(q, k), "attention"),
            lambda q, k, v: (3, 6 * size(q) + 2 * size(k) + 2 * size(v), 2.5 * attention_flops(q, k),
                             "attention, gradient"),
        )  # fmt: skip
        own_norm = counted(
            lambda: self.count, "group norm",
            lambda x, weight, bias: (3, 3 * size(x)),
            lambda x, weight, bias: (3 + 2 * weight.requires_grad, 5 * size(x)),
        )  # fmt: skip

        def norm(module, x):
            return own_norm(x, module.weight, module.bias)

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch("ddpo.fewer_kernels.scaled_dot_product_attention", attention))
            if self.own_norms:
                for name in ("norm_and_silu", "norm_alone"):
                    stack.enter_context(patch(f"ddpo.fewer_kernels.{name}", norm))
            stack.enter_context(self.mode)
            yield

    def sampling_step(self):
        """The Count of a denoising step, as ddpo/pipeline_logprob.py does it."""
        policy, sample, self.count = self.policy, self.config.sample, Count(self.precision)
        with self.running(), torch.no_grad():
            x, noise, kept = (torch.empty(self.latents) for _ in range(3))
            t, kept_log_probs = torch.empty(self.batch_size, dtype=torch.long), torch.empty(self.batch_size)
            conditions = policy.embed([""] * self.batch_size), policy.embed([""])
            with policy.masters.unchanged(), self.count:
                output = predict_noise(policy, x, t, *conditions, sample.guidance_scale)
                mean, std = policy.step_mean_std(output, t, x, sample.eta)
                value = mean + std * noise
                kept.copy_(value), kept.copy_(mean)
                kept_log_probs.copy_(policy.step_log_prob(value, mean, std))
        return self.count

    def training_pass(self):
        """The Count of scoring a batch's steps and going back, as train.py does it, with gradients to be added to."""
        policy, config, algorithm, rows = self.policy, self.config, ALGORITHMS["ddpo_is"], self.batch_size
        self.count = Count(self.precision)
        with self.running():
            latents, means = torch.empty(rows, 2, *self.latents[1:]), torch.empty(rows, 1, *self.latents[1:])
            given = Trajectories([], latents, means, torch.empty(rows, 1), torch.empty(1, dtype=torch.long))
            with patch.object(policy, "step_stds", lambda noise_level: torch.empty(1)):
                rollout = Rollout(policy, config, algorithm, 0, list(range(rows)), [""] * rows, given)
            sample, advantages = torch.empty(rows, dtype=torch.long), torch.empty(rows)
            with policy.masters.unchanged(), self.count:
                terms = rollout.score(sample, torch.empty_like(sample))
                loss, _ = algorithm.loss(terms, advantages, config.train)
                (loss.sum() / rows).backward()
        return self.count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name for name, parts in SIZES.items() if "unet" in parts and "text_2" not in parts]
    parser.add_argument("--size", default="sd15", choices=sizes)
    parser.add_argument("--batch_size", type=at_least(1), default=8)
    parser.add_argument("--lora_rank", type=at_least(0), default=4)
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--kinds", type=at_least(0), default=8, help="how many kinds of kernels to list, longest first")
    args = parser.parse_args()
    simulated = Simulated(args.size, args.lora_rank, args.precision, args.batch_size)
    print("| | kernels | GB | TFLOP | ms at best |\n|---|---|---|---|---|")
    for title, run in (("sampling step", simulated.sampling_step), ("training pass", simulated.training_pass)):
        count = run()
        totals = [counter.total() for counter in (count.kernels, count.bytes, count.flops, count.seconds)]
        rows = [(f"**{title}**", *totals)]
        for kind, _ in count.seconds.most_common(args.kinds):
            rows.append((kind, count.kernels[kind], count.bytes[kind], count.flops[kind], count.seconds[kind]))
        for name, kernels, nbytes, flops, seconds in rows:
            print(
                f"| {name} | {kernels:,} | {nbytes / 1e9:.1f} | {flops / 1e12:.2f} | {1e3 * seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    run_script(main)
