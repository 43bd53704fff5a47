"""scripts.publish through the real command line and the real hub client, with a server in the hub's place."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Handler
from diffusers import FluxPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import scripts.publish
from config.base import get_config
from ddpo.errors import InputError
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy, save_weights


class Hub(Handler):
    """The part of the hub's interface that an upload uses; keeps what it is sent in server.files."""

    protocol_version = "HTTP/1.1"

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body, path = self.body(), self.path.split("?")[0]
        self.server.calls.append((path, self.headers.get("Authorization")))
        if path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.reply(
                {"url": f"{self.server.address}/me/model", "name": "me/model", "id": "me/model"}, self.server.status
            )
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = ["lfs" if f.endswith((".safetensors", ".png")) else "regular" for f in files]
            self.reply({"files": [{"path": f, "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes)]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}} for o in objects]
            self.reply({"transfer": "basic", "objects": upload})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            self.reply({"commitUrl": f"{self.server.address}/me/model/commit/abc", "commitOid": "abc", "success": True})
        else:
            self.reply({})

    def do_PUT(self):
        data = self.body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def do_GET(self):
        self.server.calls.append((self.path, self.headers.get("Authorization")))
        self.reply({"id": "me/model", "xetEnabled": False, "siblings": [], "sha": "abc"}, self.server.status)


@pytest.fixture
def hub(http_server):
    server = http_server(Hub)
    server.calls, server.files, server.blobs, server.status = [], {}, {}, 200
    return server


PRIVATE = {  # nobody's business
    "reward": "pickscore + 0.1*alignment:http://jane:pass@10.0.0.5:8000/v1?key=secret + learned:/home/jane/my reward",
    "prompts": "/home/jane/animals.txt", "evaluate.rewards": "clipscore:/home/jane/clip, counting:https://10.0.0.5/v1",
    "reward_options.vlm_name": "/srv/models/llava",
}  # fmt: skip


def make_run(model, folder, lora_rank, **options):
    """What train.py leaves behind, with weights that differ from the base's."""
    config = get_config()
    config.update_from_flattened_dict({"model": model, "lora_rank": lora_rank, **PRIVATE, **options})
    config.run_dir = str(folder)
    policy = load_policy(model, lora_rank, "fp32", "cpu")
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p += 0.1
    save_weights(policy, folder / "checkpoints/epoch_0002")
    (folder / "images").mkdir()
    for epoch, colour in ((0, "red"), (2, "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / f"images/epoch_{epoch:04d}.png")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"epoch": i, "reward_queries": 8 * (i + 1), "reward_mean": r} for i, r in enumerate((1.25, 7.5))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return policy


def publish(run, *arguments, **env):
    command = [sys.executable, "-m", "scripts.publish", "--run", str(run), "--repo", "me/model", *arguments]
    hub = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "home"), "HF_TOKEN": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | hub | env)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_what_is_uploaded_is_the_run(tiny, tmp_path, hub, lora_rank):
    (tmp_path / "run").mkdir()
    policy = make_run(tiny, tmp_path / "run", lora_rank)
    result = publish(tmp_path / "run", "--license", "openrail", HF_ENDPOINT=hub.address, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout.splitlines()[-1].endswith("/me/model/commit/abc")
    assert hub.created["name"] == "model" and hub.created["organization"] == "me"
    assert all(token == "Bearer hf_secret" for path, token in hub.calls if path.startswith("/api/models"))

    folder = tmp_path / "downloaded"
    for name, data in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "openrail" and card.data.library_name == "diffusers" and "ddpo" in card.data.tags
    reward = "pickscore + 0.1*alignment:a-server + learned:my reward"
    for words in ("from 1.25", "to 7.5", reward, "animals.txt", "`train.clip_range` | `0.0001`", 'me/model"'):
        assert words in card.text, words
    for word in ("jane", "10.0.0.5", "secret", "pass@", "/srv", str(tmp_path), os.path.dirname(tiny)):
        assert not [name for name, data in hub.files.items() if word.encode() in data], word
    assert Image.open(folder / "curve.png").size[0] > 300
    grid = Image.open(folder / "before_after.png")
    assert grid.getpixel((5, 5)) == (255, 0, 0) and grid.getpixel((grid.width - 5, 5)) == (0, 0, 255)
    assert json.loads((folder / "ddpo_config.json").read_text())["model"] == "epsilon"
    assert "The base model, epsilon, is a folder that is not on the hub" in card.text and not card.data.base_model
    # It loads and draws as the card says.
    code = card.text.split("```python\n")[1].split("```")[0]
    said = {}
    code = code.replace("PATH/TO/epsilon", tiny)
    exec(code.replace("me/model", str(folder)).replace("num_inference_steps=50", "num_inference_steps=2"), said)
    assert said["image"].size == (32, 32) and said["pipe"].scheduler.__class__.__name__ == "DDIMScheduler"
    if lora_rank:
        assert len(load_file(folder / "pytorch_lora_weights.safetensors")) == len(policy.trainable_parameters())
    else:
        assert all(torch.equal(a, b) for a, b in zip(said["pipe"].unet.parameters(), policy.denoiser.parameters()))


@pytest.mark.parametrize(
    "model, lora_rank, options", [("tiny_sd35", 4, {"sample.shift": 3.0}), ("tiny_sd3", 0, {}), ("tiny_flux", 4, {})]
)
def test_cards_of_flow_models(request, tmp_path, model, lora_rank, options):
    """Their code draws what the policy draws without the noise of its steps."""
    model, run = request.getfixturevalue(model), tmp_path / "run"
    run.mkdir()
    options = {"sample.height": 32, "sample.width": 48, "sample.num_steps": 4, "sample.guidance_scale": 3.0} | options
    policy = make_run(model, run, lora_rank, **options)
    config = get_config()
    config.update_from_flattened_dict(options)
    policy.prepare_sampling(config.sample)
    noise = torch.randn(1, *policy.noise_shape(config.sample), generator=torch.Generator().manual_seed(0))
    ours = np.asarray(sample_with_logprob(policy, ["a cat"], noise.__getitem__, 3.0, 0.0).images[0])
    scripts.publish.prepare(str(run), "me/model", "", "mit", run / "publish")
    card = ModelCard.load(run / "publish/README.md")
    assert "flow-matching" in card.data.tags and "stable-diffusion" not in card.data.tags
    latents = noise[:, 0]
    if "flux" in model:
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    said = {"latents": latents}
    code = card.text.split("```python\n")[1].split("```")[0]
    for words, meant in (
        (f"PATH/TO/{os.path.basename(model)}", model), ("me/model", str(run / "publish")),
        ('pipe("a cat"', 'pipe("a cat", latents=latents, output_type="np"'),
    ):  # fmt: skip
        assert words in code
        code = code.replace(words, meant)
    exec(code, said)
    np.testing.assert_allclose(ours, said["image"] * 255, atol=1.01)
    assert said["image"].std() > 0.02


def test_dry_run_and_mistakes(tiny, tmp_path, hub, monkeypatch):
    (tmp_path / "run").mkdir()
    make_run(tiny, tmp_path / "run", 4)
    monkeypatch.setattr(scripts.publish, "get_token", lambda: None)
    arguments = ["publish", "--run", str(tmp_path / "run"), "--repo", "me/model"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--dry-run"])
    scripts.publish.main()
    assert (tmp_path / "run/publish/pytorch_lora_weights.safetensors").exists()
    assert "see" in (tmp_path / "run/publish/README.md").read_text().split("## Licence")[1]  # none is known
    shutil.copytree(tmp_path / "run/checkpoints/epoch_0002", tmp_path / "run/checkpoints/epoch_0001")
    scripts.publish.prepare(str(tmp_path / "run"), "me/model", "epoch_0001", "", tmp_path / "run/publish")
    card = (tmp_path / "run/publish/README.md").read_text()  # says nothing of the epoch after it
    assert "from 1.25 in the first epoch to 1.25 in epoch 1\n(8 reward queries)" in card and "epoch_0001" in card
    assert not (tmp_path / "run/publish/before_after.png").exists()
    scripts.publish.prepare(str(tmp_path / "run"), "me/model", "", "mit", tmp_path / "run/publish", "them/base")
    card = ModelCard.load(tmp_path / "run/publish/README.md")
    assert card.data.base_model == "them/base" and 'from_pretrained("them/base")' in card.text
    assert "PATH/TO" not in card.text and "them/base" in (tmp_path / "run/publish/ddpo_config.json").read_text()
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match="no token"):
        scripts.publish.main()
    hub.status = 403
    result = publish(tmp_path / "run", HF_ENDPOINT=hub.address, HF_TOKEN="hf_secret")
    assert "error: the hub refused me/model" in result.stderr and "Traceback" not in result.stderr and not hub.files
