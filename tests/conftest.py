import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from scripts.make_random_model import make_random_model

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers, and what they start, share two cores
torch.set_num_threads(1)


LONGEST = "processes sharding reliability train inputs evaluation annotate publish sweep policy bench".split()  # files


def pytest_collection_modifyitems(items):
    """The longest files first, so that the two workers end together."""
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_random_model("tiny", tmp_path_factory.mktemp("tiny") / "epsilon")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory):
    return make_random_model("tiny_xl", tmp_path_factory.mktemp("tiny") / "xl")


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory):
    return make_random_model("tiny", tmp_path_factory.mktemp("tiny") / "v_prediction", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    return make_random_model("tiny_sd3", tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd35(tmp_path_factory):
    return make_random_model("tiny_sd35", tmp_path_factory.mktemp("tiny") / "sd35")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    return make_random_model("tiny_flux", tmp_path_factory.mktemp("tiny") / "flux")


def make_clip(folder, projection_dim):
    """Saves a small random CLIPModel with CLIP's own preprocessing, and the embedded model's tokenizer, to `folder`."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/clip")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**small, "image_size": 28, "patch_size": 7, "initializer_range": 0.2},
        projection_dim=projection_dim,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 28}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=28), tokenizer).save_pretrained(folder)
    return folder


class Handler(BaseHTTPRequestHandler):
    """The part that the tests' HTTP servers share."""

    def reply(self, body, status=200):
        """Answers with bytes, or with anything else as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def http_server():
    """http_server(handler class) starts a server on a free port, which ends with the test; its `address` is http://..."""
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()


SMALL = {  # a run of seconds, whatever the preset's working point
    "threads": 1, "lora_rank": 4, "num_epochs": 2, "grid_images": 2,
    "prompts": "common_animals", "sample.num_steps": 3, "sample.images_per_epoch": 8, "sample.batch_size": 4,
    "train.batch_size": 4, "train.updates_per_epoch": 2, "train.learning_rate": 3e-4, "train.warmup_updates": 0,
    "train.clip_range": 1e-2, "train.timestep_choice": "random", "train.timestep_fraction": 1.0, "train.kl_weight": 0.0,
    "train.ema_decay": 0.0, "stats.shrinkage": 0.0, "sample.guidance_scale": 1.0,
}  # fmt: skip


def command_line(*arguments, processes=1, launcher=(), direct=False, script="train.py", **options):
    """The real command line: accelerate launch train.py, for several processes torchrun; or python train.py itself if
    `direct`. `a__b=c` stands for --config.a.b=c. `script` "tests/saboteur.py" is train.py with something broken."""
    options = SMALL | {k.replace("__", "."): v for k, v in options.items()}
    if not launcher:
        launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "1")
        if processes > 1:
            launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *([] if direct else ("-m", *launcher)), script]
    return [*command, *arguments, *(f"--config.{k}={v}" for k, v in options.items())]


_servers = {}  # of tests/forkserver.py, by the library of a simulated GPU, if any


def run(command, env=None, file_limit=0, processes=1):
    """Runs a command to its end; `python FILE` by tests/forkserver.py, so without the time that imports take, and in
    several processes if so asked. file_limit: bytes that no file may outgrow."""
    env = env or {}
    simulated = {key: value for key, value in env.items() if key == "SIMULATED_CUDA"}
    if not str(command[1]).endswith(".py"):
        environment = {**os.environ, **env}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    server = _servers.get(str(simulated))
    if server is None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = _servers[str(simulated)] = subprocess.Popen(
            [sys.executable, "tests/forkserver.py"], cwd=ROOT, text=True, env=environment | simulated,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        request = {"script": command[1], "arguments": [str(a) for a in command[2:]], "env": env}
        request |= {"stdout": str(out), "stderr": str(err), "file_limit": file_limit, "processes": processes}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def launch(*arguments, check=True, env=None, file_limit=0, **options):
    """Runs `command_line(...)` to its end. `direct` and in several processes, it does without torchrun."""
    result = run(command_line(*arguments, **options), env, file_limit, options.get("processes", 1))
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
