"""Rewards that look through a CLIP: each against transformers' own use of the model, on images of a known score."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, make_clip
from PIL import Image
from transformers import AutoModel, AutoProcessor

from config.base import get_config
from ddpo import rewards
from ddpo.clip import _load_clip, load_clip
from ddpo.errors import InputError

HEAD = Path(os.environ.get("DDPO_AESTHETIC_HEAD", ROOT / "../shared/data/aesthetic-head.pth"))
PROMPTS, METADATA = ["a cat", "a dog riding a bike", "a fish"], [{}] * 3


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    ramp = Image.fromarray(np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8))  # not a square
    return [noise, ramp, Image.new("RGB", (64, 64), "orange")]


@pytest.fixture(scope="module")
def clip_768(tmp_path_factory):
    """The architecture of the aesthetic predictor's CLIP in little, with its embedding size and preprocessing."""
    return make_clip(tmp_path_factory.mktemp("clip"), projection_dim=768)


def options(**overrides):
    result = get_config().reward_options
    result.update(overrides)
    return result


def reference_cosines(folder, images, prompts):
    """What transformers' documentation tells to do, one image at a time, with nothing of ours."""
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = [model(**processor(text=[p], images=i, return_tensors="pt")) for i, p in zip(images, prompts)]
    scale = model.logit_scale.exp().item()
    return np.array([o.logits_per_image.item() / scale for o in outputs]), scale


@pytest.mark.parametrize("folder", ["models/emoji/clip", "clip_768"])
def test_clipscore_and_pickscore_are_transformers_cosine(request, images, folder):
    folder = str(request.getfixturevalue(folder)) if folder == "clip_768" else str(ROOT / folder)
    cosines, scale = reference_cosines(folder, images, PROMPTS)
    assert np.ptp(cosines) > 1e-3  # the oracle tells the images apart
    clipscore, _ = rewards.get_reward(f"clipscore:{folder}")(images, PROMPTS, METADATA)
    np.testing.assert_allclose(clipscore, 2.5 * cosines.clip(0), atol=1e-5)
    pickscore, _ = rewards.get_reward(f"pickscore:{folder}", options=options(batch_size=2))(images, PROMPTS, METADATA)
    np.testing.assert_allclose(pickscore, scale * cosines, rtol=1e-4, atol=1e-4)


def test_half_precision_is_near(images):
    name = f"pickscore:{ROOT}/models/emoji/clip"
    exact, _ = rewards.get_reward(name)(images, PROMPTS, METADATA)
    for precision, tolerance in (("bf16", 0.5), ("fp16", 0.1)):
        half, _ = rewards.get_reward(name, options=options(precision=precision))(images, PROMPTS, METADATA)
        assert half.dtype == np.float32 and 0 < abs(half - exact).max() < tolerance


def aesthetic_reference(clip, state, images):
    """The head has no activations: its five layers are one affine map, multiplied out here in float64."""
    model, processor = AutoModel.from_pretrained(clip, dtype=torch.float32), AutoProcessor.from_pretrained(clip)
    with torch.no_grad():
        x = model.get_image_features(**processor(images=[i.convert("RGB") for i in images], return_tensors="pt"))
    x = x.pooler_output.double()
    weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in (0, 2, 4, 6, 7):
        w, b = state[f"layers.{layer}.weight"].double(), state[f"layers.{layer}.bias"].double()
        weight, bias = w @ weight, w @ bias + b
    return (x / x.norm(dim=1, keepdim=True) @ weight.T + bias).squeeze(1).numpy()


def random_head(path):
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    torch.manual_seed(1)
    state = {}
    for i, (n, m) in sizes.items():
        state |= {f"layers.{i}.weight": torch.randn(m, n) / n**0.5, f"layers.{i}.bias": torch.randn(m)}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("weights", ["random", "real"])
def test_aesthetic_is_the_affine_map(images, clip_768, tmp_path, weights):
    if weights == "real":
        if not HEAD.exists():
            pytest.skip("the real head's weights: set DDPO_AESTHETIC_HEAD to sac+logos+ava1-l14-linearMSE.pth")
        head, state = HEAD, torch.load(HEAD, map_location="cpu", weights_only=True)
    else:
        head, state = tmp_path / "head.pth", random_head(tmp_path / "head.pth")
    pictures = [*images, Image.new("RGBA", (30, 40), "blue")]
    expected = aesthetic_reference(clip_768, state, pictures)
    reward = rewards.get_reward(f"aesthetic:{head}", options=options(aesthetic_clip=str(clip_768), batch_size=3))
    values, _ = reward(pictures, ["a cat"] * 4, [{}] * 4)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(values) > 0.01
    if weights == "real":
        assert (abs(values - 5) < 5).all()  # scores lie between 0 and 10


def test_an_aesthetic_head_that_does_not_fit_is_refused(clip_768, tmp_path):
    state = random_head(tmp_path / "head.pth")
    del state["layers.6.bias"]  # strict: a missing weight must not stay random
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="layers|6.bias"):
        rewards.get_reward(f"aesthetic:{tmp_path / 'cut.pth'}", options=options(aesthetic_clip=str(clip_768)))
    with pytest.raises(InputError, match="768"):
        emoji = options(aesthetic_clip=str(ROOT / "models/emoji/clip"))
        rewards.get_reward(f"aesthetic:{tmp_path / 'head.pth'}", options=emoji)


def to_open_clip(model):
    """A CLIPModel's weights under open_clip's names, as HPSv2.1 is published: written from open_clip's module tree,
    where attention is torch.nn.MultiheadAttention and the projections are right-multiplied parameters."""
    state, out = model.state_dict(), {}
    for theirs, ours in (("", "text_model"), ("visual.", "vision_model")):
        layers = 1 + max(int(k.split("layers.")[1].split(".")[0]) for k in state if k.startswith(f"{ours}.encoder"))
        for i in range(layers):
            old, new = f"{ours}.encoder.layers.{i}.", f"{theirs}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                out[f"{new}attn.in_proj_{kind}"] = torch.cat([state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
                for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                    out[f"{new}{a}.{kind}"] = state[f"{old}{b}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"], out["text_projection"] = state["visual_projection.weight"].T, state["text_projection.weight"].T
    out["logit_scale"] = state["logit_scale"]
    return out


def test_hpsv2_reads_an_open_clip_checkpoint(images, tmp_path):
    make_clip(tmp_path, projection_dim=48)
    state = to_open_clip(AutoModel.from_pretrained(tmp_path))
    cosines, _ = reference_cosines(tmp_path, images, PROMPTS)
    (tmp_path / "model.safetensors").unlink()  # nothing but the checkpoint is left to read
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    values, _ = rewards.get_reward(f"hpsv2:{tmp_path}")(images, PROMPTS, METADATA)
    np.testing.assert_allclose(values, cosines, atol=1e-5)
    del state["visual.transformer.resblocks.0.ln_2.bias"]
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(InputError, match="layer_norm2.bias"):
        rewards.get_reward(f"hpsv2:{tmp_path}")


def test_open_clip_attention_is_torchs(tmp_path):
    """One converted layer against the module open_clip itself uses: q, k and v must not change places."""
    make_clip(tmp_path, projection_dim=48)
    model = AutoModel.from_pretrained(tmp_path)
    state, prefix = to_open_clip(model), "visual.transformer.resblocks.0.attn."
    theirs = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    x = torch.randn(2, 5, 32)
    ours = rewards.from_open_clip(state, model.config).vision_model.encoder.layers[0].self_attn
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_the_reward_would_cut_is_refused_at_the_start(images, tiny, tmp_path):
    """By the limit of its own CLIP, before any sampling, in a mixture too; without a prompt set, when it scores."""
    prompt = "a " + "very " * 30 + "cat"
    (tmp_path / "prompts.txt").write_text(f"a cat\n{prompt}\n")
    expression = "jpeg_compressibility + clipscore:models/emoji/clip"
    result = launch(model=tiny, run_dir=tmp_path / "run", reward=expression, prompts=tmp_path / "prompts.txt",
                    direct=True, check=False)  # fmt: skip
    message = r"error: reward clipscore:models/emoji/clip: the prompt 'a very.* takes 24; .*1 of 2 prompts"
    assert result.returncode == 1 and re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()
    for name in ("clipscore", "pickscore"):
        with pytest.raises(InputError, match="takes 24"):
            rewards.get_reward(f"{name}:models/emoji/clip")(images[:1], [prompt], [{}])


def test_two_rewards_share_their_clip(clip_768):
    _load_clip.cache_clear()
    rewards.get_reward(f"clipscore:{clip_768} + pickscore:{clip_768}")
    load_clip(clip_768, torch.device("cpu"))
    assert _load_clip.cache_info().misses == 1


@pytest.mark.parametrize("name", ["aesthetic", "clipscore", "pickscore", "hpsv2", "alignment", "counting", "geneval"])
def test_missing_models_say_how_to_get_them(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf download \S+/\S+") as error:
        rewards.get_reward(name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_mixtures(images):
    """pickscore + weights: the weighted sum, and each component apart."""
    folder = f"{ROOT}/models/emoji/clip"
    alone, _ = rewards.get_reward(f"clipscore:{folder}")(images, PROMPTS, METADATA)
    kb = rewards.jpeg_size(images)
    for expression, weights in (
        (f"clipscore:{folder} + 0.1*jpeg_compressibility", (1, -0.1)),
        (f"-2 * clipscore:{folder}+jpeg_incompressibility", (-2, 1)),
        (f"1e-1*clipscore:{folder} - 3*jpeg_incompressibility", (0.1, -3)),
        (f"0.5*clipscore:{folder}", (0.5, 0)),
    ):
        values, info = rewards.compute_rewards(rewards.get_reward(expression), images, PROMPTS, METADATA)
        np.testing.assert_allclose(values, weights[0] * alone + weights[1] * kb, rtol=1e-5)
        np.testing.assert_allclose(info[f"clipscore:{folder}"], alone)
        if weights[1]:
            np.testing.assert_allclose(info["jpeg_kb"], kb)


@pytest.mark.parametrize(
    "expression, message",
    [
        ("clipscor", "Did you mean clipscore"),
        ("jpeg_compressibility + pikscore", "Did you mean pickscore"),
        ("much*jpeg_compressibility", "weight 'much' is not a number"),
        ("jpeg_compressibility +", "unknown reward ''"),
        ("jpeg_compressibility:models", "takes no model"),
        ("learned:nowhere", "holds no reward model"),
        ("learned", "holds no reward model"),
        ("clipscore:./nowhere", "does not hold such a model"),
    ],
)
def test_mistakes_in_an_expression(expression, message):
    with pytest.raises(InputError, match=message):
        rewards.get_reward(expression)


def test_one_bad_component_is_named(images, monkeypatch):
    def broken(images, prompts, metadata):
        return [float("nan")] * len(images), {}

    monkeypatch.setitem(rewards.REWARDS, "broken", broken)
    with pytest.raises(InputError, match="^reward broken returned nan for the prompt 'a cat'"):
        reward = rewards.get_reward("jpeg_compressibility + 0*broken")
        rewards.compute_rewards(reward, images, PROMPTS, METADATA)


def test_the_command_line_trains_on_a_mixture(tiny, tmp_path):
    expression = "clipscore:models/emoji/clip + 0.1*jpeg_compressibility"
    launch(model=tiny, run_dir=tmp_path / "run", reward=expression, threads=1, direct=True)

    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    total = line["clipscore:models/emoji/clip"] + 0.1 * line["jpeg_compressibility"]
    assert line["reward_mean"] == pytest.approx(total, rel=1e-4) and line["jpeg_kb"] == -line["jpeg_compressibility"]
