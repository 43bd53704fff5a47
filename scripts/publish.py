"""Uploads a run's LoRA, UNet or transformer to the hub, with a model card.

    python -m scripts.publish --run runs/NAME --repo USER/NAME              (uploads)
    python -m scripts.publish --run runs/NAME --repo USER/NAME --dry-run    (only writes RUN/publish/, to look at)

The card names the base model and its licence, the reward, the options, and shows the curve, the first and last image
grid and how to load the weights. The token is HF_TOKEN, or that of `hf auth login`. A repository that is made here is
public unless --private.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import matplotlib
from huggingface_hub import HfApi, ModelCard, get_token
from PIL import Image
from safetensors import safe_open

from ddpo.checkpoint import epoch_of, list_checkpoints
from ddpo.errors import InputError, run_script
from ddpo.models import absent_parts
from ddpo.options import flatten
from ddpo.policy import LORA_FILE
from ddpo.rewards import read_terms
from scripts.results import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def public_name(name):
    """A model's or prompt file's name without what is of this machine: a hub name as it is, of a path the last part,
    of an address nothing."""
    if "://" in name:
        return "a-server"
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not os.path.exists(name)
    return name if on_hub else os.path.basename(os.path.normpath(name)) if name else ""


def public_options(options, prefix=""):
    """A run's options without paths of this machine and addresses."""
    made = {}
    for key, value in options.items():
        if isinstance(value, dict):
            value = public_options(value, f"{prefix}{key}.")
        elif prefix + key in ("reward", "evaluate.rewards"):
            for expression in value.split(","):
                for _, _, name, model in read_terms(expression):
                    shown = os.path.basename(os.path.normpath(model)) if name == "learned" else public_name(model)
                    value = value.replace(f":{model}", f":{shown}") if model else value
        elif isinstance(value, str) and ("/" in value or os.sep in value):
            value = public_name(value)
        made[key] = value
    return made


def base_licence(model):
    """The licence that the base model states, on the hub or in its folder's README; "" if it is not to be found."""
    try:
        if os.path.isdir(model):
            return str(ModelCard.load(Path(model) / "README.md").data.get("license") or "")
        return str(ModelCard.load(model).data.get("license") or "")
    except Exception:  # no card, or no network: the card will say that it is unknown
        return ""


def code_to_draw(sample, part, network, base, absent, repo):
    """The card's Python: draws as the run was sampled, a flow without the noise of its steps. sample: config.sample;
    part: "unet" or "transformer"; network: its class if it was finetuned in full, "" for a LoRA; base: the base model's
    name; absent: its parts that the pipeline must be told to do without."""
    names, lines = ["DiffusionPipeline"], []
    options = "".join(f", {name}=None" for name in absent)
    if network:
        names.append(network)
        lines.append(f'{part} = {network}.from_pretrained("{repo}", subfolder="{part}")')
        options += f", {part}={part}"
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{base}"{options})')
    if not network:
        lines.append(f'pipe.load_lora_weights("{repo}")')
    call = "num_inference_steps={num_steps}, guidance_scale={guidance_scale}".format(**sample)
    call += "".join(f", {side}={sample[side]}" for side in ("height", "width") if sample.get(side))
    if part == "unet":
        names.append("DDIMScheduler")
        lines.append("pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # sampled as in training")
        call += f", eta={sample['eta']}"
    elif sample.get("shift"):
        names.append("FlowMatchEulerDiscreteScheduler")
        lines.append(f"shift = {{'shift': {sample['shift']}, 'use_dynamic_shifting': False}}  # as in training")
        lines.append("pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **shift)")
        call += ", sigmas=[1 - i / {num_steps} for i in range({num_steps})]".format(**sample)
    lines.append(f'image = pipe("a cat", {call}).images[0]')
    return f"from diffusers import {', '.join(sorted(names))}\n\n" + "\n".join(lines)


def write_card(run, config, kind, part, absent, repo, checkpoint, licence, folder):
    """Writes FOLDER/README.md, curve.png and before_after.png. kind: "lora", or the part that was finetuned in full;
    part, absent: as for code_to_draw."""
    epochs = epoch_of(checkpoint)  # what came after is of other weights
    metrics = {key: values[:epochs] for key, values in read_metrics(run).items()}
    figure, axes = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    sampled = "reward_mean" in metrics
    x, y = ("reward_queries", "reward_mean") if sampled else ("epoch", "loss")  # the latter: scripts.train_dpo
    axes.plot(metrics[x], metrics[y], marker=".")
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(f"mean reward: {config['reward']}" if sampled else "loss on the choices")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curve.png", dpi=150)
    plt.close(figure)
    grids = [g for g in sorted(Path(run, "images").glob("epoch_*.png")) if int(g.stem.split("_")[1]) <= epochs]
    if len(grids) > 1:
        before, after = Image.open(grids[0]), Image.open(grids[-1])
        sheet = Image.new("RGB", (before.width + 24 + after.width, max(before.height, after.height)), "white")
        sheet.paste(before, (0, 0))
        sheet.paste(after, (before.width + 24, 0))
        sheet.save(folder / "before_after.png")
    base, first, last = config["model"], metrics[y][0], metrics[y][-1]
    on_hub = "/" in base
    header = {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "license": licence or "other",
        "tags": [*(["ddpo", "reinforcement-learning"] if sampled else ["diffusion-dpo"]),
                 "stable-diffusion" if part == "unet" else "flow-matching", *(["lora"] if kind == "lora" else [])],
    }  # fmt: skip
    if on_hub:  # a folder's name means nothing there
        header["base_model"] = base
    missing = "" if on_hub else (
        f"\nThe base model, {base}, is a folder that is not on the hub: without a copy of it, to be named instead of "
        f"PATH/TO/{base}, the code does not run.\n"
    )  # fmt: skip
    method = {
        "lora": f"LoRA of rank {config['lora_rank']}", "unet": "full finetuning of the UNet",
        "transformer": "full finetuning of the transformer",
    }[kind]  # fmt: skip
    network = "" if kind == "lora" else json.loads((folder / kind / "config.json").read_text())["_class_name"]
    code = code_to_draw(config["sample"], part, network, base if on_hub else f"PATH/TO/{base}", absent, repo)
    options = "\n".join(f"| `{key}` | `{value}` |" for key, value in sorted(flatten(config).items()))
    what, when = "The mean reward" if sampled else "The loss on them", f"epoch {len(metrics[y])}"
    if sampled:
        how = f"with reinforcement learning ([DDPO](https://arxiv.org/abs/2305.13301), {method}) for the reward\n"
        how += f"`{config['reward']}` on the prompts `{config['prompts']}`."
        when += f"\n({int(metrics['reward_queries'][-1]):,} reward queries)"
    else:
        name = {"dpo": "[Diffusion-DPO](https://arxiv.org/abs/2311.12908)", "sft": "on the chosen ones"}
        how = f"on people's choices between two images ({name[config['choices_loss']]}, {method})."
    text = f"""---
{json.dumps(header, indent=1)}
---
# {repo.split("/")[1]}

`{base}`, finetuned {how}

{what} went from {first:.4g} in the first epoch to {last:.4g} in {when}; these are the weights of `{checkpoint}`.

![{what.lower()}](curve.png)
{"![the same prompts and noise before and after](before_after.png)" if len(grids) > 1 else ""}

## Use
{missing}
```python
{code}
```

## Licence

{f"That of the base model: {licence}." if licence else f"That of the base model; see {base}."}

## Options

| option | value |
|---|---|
{options}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def is_transformer(checkpoint):
    """Whether a checkpoint's weights are those of SD 3.x or FLUX.1, not of a UNet."""
    lora = Path(checkpoint, "lora", LORA_FILE)
    if not lora.exists():
        return Path(checkpoint, "transformer").exists()
    with safe_open(lora, "pt") as f:
        return any(key.startswith("transformer.") for key in f.keys())


def prepare(run, repo, checkpoint, licence, folder, base_model=""):
    """Fills `folder` with what is uploaded: the card, its images, config.json of the run, the weights. base_model:
    the hub name of the base model, if the run had it from a folder."""
    try:
        config = json.loads(Path(run, "config.json").read_text())
        del config["run_dir"], config["resume"]  # folders of this machine
        if config.get("choices"):
            del config["choices"], config["prompts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run!r} is not a run: it has no config.json that can be read") from error
    folders = {os.path.basename(name): name for name in list_checkpoints(run)}
    if not folders or (checkpoint and checkpoint not in folders):
        raise InputError(f"{run} has no checkpoint {checkpoint or 'yet'}; there is {', '.join(folders) or 'none'}")
    checkpoint = checkpoint or list(folders)[-1]
    if not epoch_of(checkpoint):
        raise InputError(f"{run}: {checkpoint} was saved before the first epoch was trained: it is the base model")
    part = "transformer" if is_transformer(folders[checkpoint]) else "unet"
    kind = "lora" if config["lora_rank"] else part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # A LoRA lies at the top, where load_lora_weights looks; a network in its part's folder, as in every pipeline.
    shutil.copytree(Path(folders[checkpoint], kind), folder / ("" if kind == "lora" else kind), dirs_exist_ok=True)
    for path in folder.rglob("*.json"):  # diffusers notes from which folder a model was loaded
        content = json.loads(path.read_text())
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content, indent=2))
    licence = licence or base_licence(base_model or config["model"])
    index = Path(config["model"], "model_index.json")  # of a hub name all is there
    absent = absent_parts(json.loads(index.read_text())) if index.exists() else {}
    config = public_options(config) | ({"model": base_model} if base_model else {})
    (folder / "ddpo_config.json").write_text(json.dumps(config, indent=2))
    write_card(run, config, kind, part, absent, repo, checkpoint, licence, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--repo", required=True, help="USER/NAME on the hub")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--licence", "--license", default="", help="default: what the base model states")
    parser.add_argument("--base_model", default="", help="its hub name, if the run had the base model from a folder")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="write RUN/publish/ and upload nothing")
    args = parser.parse_args()
    for option, name in (("--repo", args.repo), ("--base_model", args.base_model or args.repo)):
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise InputError(f"{option} {name!r} must be USER/NAME")
    token = get_token()
    if not (token or args.dry_run):
        raise InputError("no token: set HF_TOKEN, or run `hf auth login`; --dry-run needs none")
    folder = Path(args.run, "publish")
    prepare(args.run, args.repo, args.checkpoint, args.licence, folder, args.base_model)
    if args.dry_run:
        return print(f"{folder} is what would be uploaded to {args.repo}")
    api = HfApi(token=token)
    try:
        api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=args.repo, folder_path=folder, commit_message="Upload by ddpo")
    except Exception as error:  # the hub's, the network's, a name's: all have errors of their own
        raise InputError(f"the hub refused {args.repo}: {' '.join(str(error).split())[:300]}") from error
    print(commit.commit_url)


if __name__ == "__main__":
    run_script(main)
