"""GPU memory that a run in bf16 holds beside activations where several GPUs share the network (config/fsdp/), computed
from the numbers of weights of networks of true size, without a GPU or any data.

    python -m scripts.dev.sharded_memory

On one GPU a weight that is trained takes 18 bytes: for the network (2), its master (4), gradient (4) and moments (8).
Shared ones take 16, each on one GPU: FSDP rounds the masters as it gathers them. A LoRA's take 18 and stay whole; those
that it stands on take 2. Gathered at a time are, in bf16, the weights of no block and the two largest blocks, one of
them on its way, and for full finetuning the largest one's gradient in 6 bytes: as it is computed and, in float32, as it
is summed. The moving average takes 4 bytes; the base model that a KL needs 2 and, where weights are shared, 4 for the
trained ones whose place it takes; for a LoRA it takes nothing. T5 is shared, in bf16. CLIPs, VAE and the reward's CLIP
(ViT-H, of pickscore and hpsv2) are whole on each GPU, in float32.
"""

import argparse
import math

import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from config.flux import get_config as flux_config
from ddpo.errors import at_least, run_script
from scripts.make_random_model import SIZES, make_unet

T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
VIT_H = {  # laion/CLIP-ViT-H-14
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14,
                      "num_attention_heads": 16},
    "projection_dim": 1024,
}  # fmt: skip
CASES = {  # of config/fsdp: what it is, its VAE, its CLIPs, and whether it has T5
    "sdxl": ("SDXL, all weights", "sdxl", ("text", "text_2"), False),
    "sd3": ("SD3.5-medium, all weights", "sd35", ("text", "text_2"), True),
    "flux": ("FLUX.1-dev, LoRA of rank 32", "sd35", ("text",), True),
}


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def make_network(case):
    """A network without data, a LoRA on FLUX.1's."""
    if case == "sdxl":
        return make_unet("sdxl")
    if case == "sd3":
        return SD3Transformer2DModel(**SIZES["sd35"]["sd3"])
    network, config = FluxTransformer2DModel(guidance_embeds=True).requires_grad_(False), flux_config()
    targets = config.lora_targets.split(",")
    network.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets))
    return network


def make_others(size, names, has_t5):
    """Bytes of T5, the CLIPs and the VAE."""
    clips = [CLIPTextModel(CLIPTextConfig(**SIZES[size][name])) for name in names]
    t5 = 2 * count(T5EncoderModel(T5Config(**T5_XXL))) if has_t5 else 0
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return t5, 4 * count(*clips), 4 * count(AutoencoderKL(**kinds, **SIZES[size]["vae"]))


def held(network, blocks, gpus):
    """Bytes of {what is held: on each of the GPUs}."""
    base = [p for name, p in network.named_parameters() if "lora_" not in name]
    lora = count(network) - sum(p.numel() for p in base)
    own = sum(math.ceil(p.shape[0] / gpus) * (p.numel() // p.shape[0]) for p in base)  # rows are dealt out
    largest = sorted((count(module) for module in network.modules() if type(module).__name__ in blocks), reverse=True)
    gathered = 0 if gpus == 1 else 2 * (count(network) - sum(largest) + sum(largest[:2])) + (not lora) * 6 * largest[0]
    if lora:
        return {"weights and optimizer": 2 * own + 18 * lora, "gathered": gathered, "average": 4 * lora, "base": 0}
    each = (18, 2) if gpus == 1 else (16, 6)
    return {"weights and optimizer": each[0] * own, "gathered": gathered, "average": 4 * own, "base": each[1] * own}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=at_least(1), nargs="+", default=[1, 2, 8])
    args = parser.parse_args()
    columns = "weights and optimizer", "gathered", "average", "base", "T5", "CLIPs", "VAE", "reward"
    print(f"| GB on each GPU | GPUs | {' | '.join(columns)} | all |")
    print("|---" * (len(columns) + 3) + "|")
    with torch.device("meta"):
        reward = 4 * count(CLIPModel(CLIPConfig(**VIT_H)))
        for case, (name, *parts) in CASES.items():
            sharding = load_config_from_file(f"config/fsdp/{case}.yaml").fsdp_config
            blocks = sharding["fsdp_transformer_layer_cls_to_wrap"].split(",")
            network, (t5, clips, vae) = make_network(case), make_others(*parts)
            for gpus in args.gpus:
                row = {"T5": t5 / gpus, "CLIPs": clips, "VAE": vae, "reward": reward, **held(network, blocks, gpus)}
                cells = [f"{row[column] / 1e9:.1f}" for column in columns]
                print(f"| {name} | {gpus} | {' | '.join(cells)} | {sum(row.values()) / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
