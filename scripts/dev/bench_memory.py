"""GPU memory of a training step, computed without a GPU or any data: a table of memory against batch size.

    python -m scripts.dev.bench_memory --size sd15 --batch_sizes 1 2 4 8 16 --json results/bench/memory.json

The network's forward and backward pass runs on fake tensors, and every storage is counted from its making to its end:
the largest sum is the peak. Gradients and Adam's moments are counted too. Not counted: VAE and text encoder (0.34 and
0.49 GB in float32 for Stable Diffusion 1.5), trajectories (6.6 MB an image of 50 steps), what CUDA itself takes, and
what an allocator loses to fragments. These are computed figures, not measured ones.
"""

import argparse
import json
import weakref
from pathlib import Path

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from config.base import get_config
from ddpo.errors import at_least, run_script
from ddpo.fewer_kernels import use_fewer_kernels
from ddpo.masters import Masters
from ddpo.policy import PRECISIONS
from scripts.make_random_model import SIZES, make_unet


class Peak(TorchDispatchMode):
    """Bytes of the storages that live, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result


def step_memory(size, lora_rank, precision, batch_size, checkpointing, guidance=True):
    """Bytes at the peak of a training step of `batch_size` transitions: weights, activations, gradients, moments.

    size: a key of make_random_model's SIZES; lora_rank, precision: as in config/base.py.
    """
    dtype, text_2 = PRECISIONS[precision], SIZES[size].get("text_2")
    with torch.device("meta"):
        unet = make_unet(size).requires_grad_(not lora_rank)
        if lora_rank:
            targets = get_config().lora_targets.split(",")
            unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
    peak, rows = Peak(), batch_size * (1 + guidance)
    use_fewer_kernels(unet)
    with FakeTensorMode(), peak:
        for module in unet.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.nn.Parameter(torch.empty(p.shape), requires_grad=p.requires_grad)
                    module._parameters[name] = fake
        masters = Masters(unet, dtype)
        fake = None
        peak.most = peak.now
        moments = [torch.empty_like(p) for p in masters.parameters for _ in range(2)]  # held to the end
        if checkpointing:
            unet.enable_gradient_checkpointing()
        latents = torch.empty(rows, 4, *[unet.config.sample_size] * 2, dtype=dtype)
        states, more = torch.empty(rows, 77, unet.config.cross_attention_dim, dtype=dtype), None
        if text_2:
            pooled = torch.empty(rows, text_2["projection_dim"], dtype=dtype)
            more = {"text_embeds": pooled, "time_ids": torch.ones(rows, 6)}
        output = unet(latents, torch.ones(rows), states, added_cond_kwargs=more).sample.float()
        output.square().mean().backward()
    del moments
    return peak.most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd15", choices=SIZES)
    parser.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=PRECISIONS)
    parser.add_argument("--json", help="file to write the rows to")
    args = parser.parse_args()
    print(f"| {args.size}: GB at batch size | {' | '.join(map(str, args.batch_sizes))} |")
    print("|---" * (len(args.batch_sizes) + 1) + "|")
    rows = []
    for rank in (4, 0):
        for precision in args.precisions:
            for checkpointing in (True, False):
                name = f"{f'LoRA of rank {rank}' if rank else 'full'}, {precision}"
                name += ", gradient checkpointing" if checkpointing else ""
                used = [step_memory(args.size, rank, precision, b, checkpointing) / 1e9 for b in args.batch_sizes]
                rows.append({"name": name, "gb": dict(zip(args.batch_sizes, used))})
                print(f"| {name} | {' | '.join(f'{gb:.1f}' for gb in used)} |", flush=True)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
