"""CLIP-like models as judges: loading, and unit embeddings of images and prompts.

Preprocessing is always the model's own processor on uint8 images. A reward that rescales or normalises images in
its own way gives the model other inputs than it was trained on, and no error says so.
"""

import functools
import os

import torch
import transformers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from ddpo.errors import InputError, choose
from ddpo.prompts import check_length

transformers.utils.logging.disable_progress_bar()  # of loading weights; downloads keep theirs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def not_found(name, error):
    """The InputError of model files that are missing: one line that says how to get them."""
    reason = " ".join(str(error).split())[:200]
    if os.path.exists(name) or name.startswith((".", "/", "~")):
        return InputError(f"{name!r} does not hold such a model ({type(error).__name__}: {reason})")
    return InputError(
        f"cannot load {name!r}. On a machine with internet access, `hf download {name}` fetches it (then copy the "
        f"cache, or give a folder's path); here: {type(error).__name__}: {reason}"
    )


def complete(loaded, files_lack="its files lack"):
    """The model of what `from_pretrained(..., output_loading_info=True)` returned. Raises ValueError if its files lack
    weights, which would otherwise be random numbers."""
    model, info = loaded
    missing = sorted(key for key in info["missing_keys"] if ".pooler." not in f".{key}")  # nothing here reads a pooler
    if missing:
        raise ValueError(f"{files_lack} {len(missing)} weights, {missing[0]} the first of them")
    return model


def load_clip(name, device="cpu", precision="fp32", processor=""):
    """A CLIPModel, frozen, and its processor; loaded once for all that use the same.

    Args:
        name: hub name or folder of the model.
        processor: hub name or folder of the processor, if not the model's own.
    Raises:
        InputError that says how to get the files, if they are not there.
    """
    return _load_clip(
        str(name), str(device), choose("reward_options.precision", precision, DTYPES), str(processor or name)
    )


@functools.lru_cache(maxsize=4)
def _load_clip(name, device, dtype, processor):
    try:
        model = complete(CLIPModel.from_pretrained(name, dtype=dtype, output_loading_info=True))
        processor = CLIPProcessor.from_pretrained(processor)
    except Exception as error:  # missing files, foreign formats: every loader has its own error
        raise not_found(name, error) from error
    # Some tokenizers know no limit; the model's own then cuts, or crashes.
    limit = model.config.text_config.max_position_embeddings
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, limit)
    return model.to(device).eval().requires_grad_(False), processor


def image_pixels(clip, images):
    """What the vision model takes (B, 3, H, W) of B PIL images, on its device and in its precision."""
    model, processor = clip
    images = [image.convert("RGB") for image in images]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels.to(model.device, model.dtype)


@torch.no_grad()
def embed_images(clip, images, batch_size=32):
    """Unit embeddings (B, D), float32 on the model's device, of B PIL images."""
    embeddings = []
    for start in range(0, len(images), batch_size):
        pixels = image_pixels(clip, images[start : start + batch_size])
        embeddings.append(clip[0].get_image_features(pixels).pooler_output.float())
    return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)


@torch.no_grad()
def embed_texts(clip, texts, batch_size=32):
    """Unit embeddings (B, D), float32 on the model's device, of B prompts; each different one is encoded once.

    Raises InputError for a prompt that the text encoder would cut.
    """
    model, processor = clip
    unique = sorted(set(texts))
    check_length(unique, processor.tokenizer)
    embeddings = []
    for start in range(0, len(unique), batch_size):
        tokens = processor.tokenizer(unique[start : start + batch_size], padding=True, return_tensors="pt")
        embeddings.append(model.get_text_features(**tokens.to(model.device)).pooler_output.float())
    embeddings = torch.nn.functional.normalize(torch.cat(embeddings), dim=-1)
    return embeddings[[unique.index(text) for text in texts]]


def cosine(clip, images, texts, batch_size=32):
    """(B,) cosines between each image's embedding and its prompt's."""
    return (embed_images(clip, images, batch_size) * embed_texts(clip, texts, batch_size)).sum(-1).cpu()


def from_open_clip(state, config):
    """A transformers CLIPModel with the weights of an open_clip ViT checkpoint, which stores its attention's query,
    key and value as one matrix and its projections transposed. `config`: the CLIPConfig of the same architecture.

    Raises RuntimeError if a weight is missing, left over or of another shape.
    """
    names = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    parts = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm"}  # fmt: skip
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
              "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    converted = {}
    for key, value in state.items():
        part, _, kind = key.rpartition(".")
        if key in ("visual.proj", "text_projection"):
            converted[names[key]] = value.T.contiguous()
        elif key in names:
            converted[names[key]] = value
        elif part in parts:
            converted[f"{parts[part]}.{kind}"] = value
        elif "transformer.resblocks." in key:
            tower = "vision_model" if key.startswith("visual.") else "text_model"
            layer, rest = key.split("resblocks.")[1].split(".", 1)
            prefix = f"{tower}.encoder.layers.{layer}"
            if rest.startswith("attn.in_proj_"):
                for name, chunk in zip("qkv", value.chunk(3)):
                    converted[f"{prefix}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = chunk
            else:
                part, _, kind = rest.rpartition(".")
                converted[f"{prefix}.{inside.get(part, part)}.{kind}"] = value
        elif key != "attn_mask":  # a constant that old checkpoints carry
            converted[key] = value
    model = CLIPModel(config if isinstance(config, CLIPConfig) else CLIPConfig.from_dict(config))
    model.load_state_dict(converted)
    return model
