"""The UNet with fewer kernels is diffusers' UNet: its output and its gradient, in fewer operations."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo.fewer_kernels import use_fewer_kernels
from scripts.make_random_model import make_unet


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("size", ["tiny", "tiny_xl"])
@pytest.mark.parametrize("rank, others", [(0, []), (4, []), (4, ["proj_in", "proj_out"])])
def test_it_is_the_same_network(size, rank, others):
    """others: targets of a LoRA that are convolutions in one network and linear layers in the other."""
    torch.manual_seed(0)
    plain = make_unet(size).requires_grad_(not rank).eval()
    if rank:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", *others]
        plain.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    fewer = copy.deepcopy(plain)
    use_fewer_kernels(fewer)
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, plain.config.cross_attention_dim)
    more = {"text_embeds": torch.randn(2, 8), "time_ids": torch.ones(2, 6)} if size == "tiny_xl" else None

    def run(unet):
        with Operations() as operations:
            output = unet(latents, torch.tensor([1, 500]), context, added_cond_kwargs=more).sample
            output.square().sum().backward()
        return output, [p.grad for p in unet.parameters() if p.requires_grad], operations.names

    (output, gradient, names), (theirs, their_gradient, their_names) = run(fewer), run(plain)
    torch.testing.assert_close(output, theirs, rtol=1e-5, atol=1e-5)
    for ours, other in zip(gradient, their_gradient, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)
    assert names.count("div") < their_names.count("div")
    assert not rank or others or len(names) < 0.8 * len(their_names)
    again = copy.deepcopy(fewer)  # as a base model's copy: with weights of its own
    for p in fewer.parameters():
        p.data.zero_()
    torch.testing.assert_close(run(again)[0], output)
