"""Weights that processes share (FSDP2) change nothing either. See test_processes.py for what BY_PROMPT is for."""

import re

import diffusers
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, launch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from test_processes import BY_PROMPT, assert_same_run, distance
from test_train import metrics

from config.base import get_config
from ddpo.errors import InputError
from ddpo.hardware import fit_batch_sizes
from ddpo.policy import load_policy, load_weights, save_weights
from ddpo.sharding import Sharding, gather, is_sharded, requested

ON = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch --use_fsdp --fsdp_version 2` says
SMALLER = {**BY_PROMPT, "direct": True, "sample__num_steps": 2, "grid_images": 1, "grid_every": 0}
SMALLER |= {"sample__guidance_scale": 2.0}


def run_sharded(processes=2, sabotage="by prompt", blocks="", **options):
    """train.py in processes that share the weights. Few blocks: each costs a message a pass, which busy cores make
    wait."""
    env = ON | {"SABOTAGE": sabotage, "FSDP_TRANSFORMER_CLS_TO_WRAP": blocks}
    return launch(processes=processes, **SMALLER | options | {"env": env})


def assert_same_network(one, two, model):
    """Two runs in full: in their metrics, and in how far training moved the weights, all in files for anyone to load;
    but for rounding (see test_processes.py)."""
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        for key in {"reward_mean", "reward_std", "grad_norm", "loss", "approx_kl", "kl_base"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
        assert ours["ratio_error"] == theirs["ratio_error"] == 0
    (folder,) = (one / "checkpoints/epoch_0002").glob("*/")
    (other,) = (two / "checkpoints/epoch_0002").glob("*/")
    config = (folder / "config.json").read_text()
    assert folder.name == other.name and config == (other / "config.json").read_text()
    kind, base = getattr(diffusers, DiffusionPipeline.load_config(model)[folder.name][1]), f"{model}/{folder.name}"
    ours, theirs, base = (kind.from_pretrained(path).state_dict() for path in (folder, other, base))
    assert distance([ours[k] - base[k] for k in base], [theirs[k] - base[k] for k in base]) < 1e-3


def test_a_sharded_unet_is_killed_and_goes_on_whole(tiny_xl, tmp_path):
    """With a moving average, and evaluations in which one process has less to draw than the other."""
    options = {"model": tiny_xl, "lora_rank": 0, "train__ema_decay": 0.5}
    options |= {"evaluate__every": 2, "evaluate__count": 1, "evaluate__limit": 3}
    options |= {"evaluate__clip": "", "evaluate__classifier": ""}
    killed = {"sabotage": "is killed later", "check": False}
    run_sharded(run_dir=tmp_path / "two", blocks="CrossAttnUpBlock2D", **options, **killed)
    assert [path.name for path in (tmp_path / "two/checkpoints").iterdir()] == ["epoch_0001"]
    launch(resume=tmp_path / "two", **SMALLER | options)
    launch(run_dir=tmp_path / "one", **SMALLER | options)
    assert_same_network(tmp_path / "one", tmp_path / "two", tiny_xl)
    one, two = ((tmp_path / name / "evaluation.jsonl").read_text() for name in ("one", "two"))
    assert one == two and one.count("\n") == 2


def test_a_flow_goes_on_in_four_sharded_processes(tiny_sd35, tmp_path):
    """With a moving average, and a divergence from the base model, whose weights are sharded, too; with recomputing."""
    options = {"model": tiny_sd35, "lora_rank": 0, "train__ema_decay": 0.5, "train__kl_weight": 0.1}
    launch(run_dir=tmp_path / "four", num_epochs=1, **SMALLER | options)
    run_sharded(4, resume=tmp_path / "four", train__gradient_checkpointing=True, **options)
    launch(run_dir=tmp_path / "one", **SMALLER | options)
    assert_same_network(tmp_path / "one", tmp_path / "four", tiny_sd35)


def test_a_lora_stands_on_a_sharded_network(tiny_flux, tmp_path):
    options = {"model": tiny_flux, "lora_rank": 4, "train__kl_weight": 0.1}
    options |= {"lora_targets": "to_q,to_k,to_v,to_out.0,add_q_proj", "sample__height": 32, "sample__width": 32}
    result = run_sharded(run_dir=tmp_path / "two", **options)
    assert "fp32, sharded" in result.stdout
    launch(run_dir=tmp_path / "one", **SMALLER | options)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    pipe = DiffusionPipeline.from_pretrained(tiny_flux)
    pipe.load_lora_weights(str(tmp_path / "two/checkpoints/epoch_0002/lora"))


def test_accelerate_launch_shards_by_a_config_file(tiny_sd35, tmp_path):
    launcher = ("accelerate.commands.launch", "--config_file", "config/fsdp/sd3.yaml", "--num_processes", "2")
    options = {"lora_rank": 0, "num_epochs": 1, "precision": "bf16", "direct": False, "launcher": launcher}
    result = launch(run_dir=tmp_path / "run", model=tiny_sd35, **SMALLER | options)
    assert "bf16, sharded" in result.stdout and metrics(tmp_path / "run")[0]["ratio_error"] == 0
    weights = load_file(tmp_path / "run/checkpoints/epoch_0001/transformer/diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("path", sorted((ROOT / "config/fsdp").iterdir()), ids=lambda path: path.stem)
def test_config_files_name_blocks_and_options_that_exist(path):
    config, flags = load_config_from_file(str(path)), {action.dest for action in launch_command_parser()._actions}
    assert config.distributed_type == "FSDP" and config.fsdp_config.keys() <= flags
    blocks = set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","))
    networks = diffusers.UNet2DConditionModel, diffusers.SD3Transformer2DModel, diffusers.FluxTransformer2DModel
    assert any(blocks <= set(network._no_split_modules) for network in networks)


@pytest.mark.parametrize("env, options, message", [
    ({"FSDP_VERSION": "1"}, {}, "fsdp_version = 1 is not supported: launch with --fsdp_version 2"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params = true is not supported"),
    ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward = false is not supported"),
    ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "use TRANSFORMER_BASED_WRAP"),
    ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "checkpoints are whole files"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "use --config.train.gradient_checkpointing=True"),
    ({}, {"precision": "fp16"}, "FSDP does not go with config.precision = fp16: use bf16"),
    ({}, {"compile": True}, "FSDP does not go with config.compile"),
    ({}, {"algorithm": "rwr_sparse"}, "FSDP does not go with config.algorithm = rwr_sparse, by which"),
])  # fmt: skip
def test_what_sharding_does_not_go_with_is_refused(monkeypatch, env, options, message):
    for name, value in (ON | env).items():
        monkeypatch.setenv(name, value)
    config = get_config()
    config.update(options)
    with pytest.raises(InputError, match=re.escape(message)):
        requested(config)


def test_a_gradient_that_is_not_finite_is_found_when_sharded(tiny_sd35, tmp_path):
    options = {"algorithm": "not_finite", "script": "tests/saboteur.py", "lora_rank": 0, "sample__batch_size": 2}
    result = run_sharded(
        model=tiny_sd35, run_dir=tmp_path, sabotage="the gradient is not finite", reward="jpeg_compressibility",
        check=False, **options,
    )  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1
    assert "the gradient is not finite at timestep" in errors[0] and "(loss " in errors[0]


# --------------------------------------------------------------------------------------- one process that shares alone
@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_blocks_and_batch_sizes_must_be_named(tiny, alone):
    with pytest.raises(InputError, match="UNet2DConditionModel has no JointTransformerBlock, but Basic"):
        load_policy(tiny, 0, "fp32", "cpu", sharding=Sharding(("JointTransformerBlock",)))
    policy, config = load_policy(tiny, 0, "fp32", "cpu", sharding=Sharding(("CrossAttnUpBlock2D",))), get_config()
    assert fit_batch_sizes(policy, config, 1, 8, 0) == (8, 8)
    config.sample.batch_size = 0
    with pytest.raises(InputError, match="with FSDP no batch sizes are tried: give --config.sample.batch_size and"):
        fit_batch_sizes(policy, config, 1, 8, 0)


def passes(policy):
    """The output of a batch, the base model's after an update, and the gradients; all by one and the same seed."""
    shape = (3, *policy.latent_shape(32, 32))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = latents, torch.tensor([1.0, 300.7, 999.0]), policy.embed(["a cat", "a dog", ""])
    policy.forward(*given).square().mean().backward()
    gradients = [gather(p.grad) for p in policy.trainable_parameters()]
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.sub_(1e-3)
        trained = policy.forward(*given)
        with policy.base():
            base = policy.forward(*given)
    return trained, base, gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model, rank, blocks", [("tiny", 0, ("CrossAttnUpBlock2D",)), ("tiny_sd35", 0, ()), ("tiny_flux", 4, ())]
)
def test_a_pass_and_its_gradient_are_the_same(request, tmp_path, alone, model, rank, blocks, precision):
    """Up to rounding, as convolutions have another layout in memory. Timesteps, above all, stay float32: in bf16 the
    gradients of tiny_sd35 would differ by 5e-2."""
    folder, results = request.getfixturevalue(model), []
    for sharding in (None, Sharding(blocks)):
        policy = load_policy(folder, rank, precision, "cpu", sharding=sharding)
        policy.keep_base()
        results.append(passes(policy))
        assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert is_sharded(policy.trainable_parameters()) == (rank == 0)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2 if model == "tiny" else 5e-3}[precision]
    for ours, theirs in zip(results[1], results[0], strict=True):
        ours, theirs = ([x] if torch.is_tensor(x) else x for x in (ours, theirs))
        assert distance(ours, theirs) <= tolerance
    save_weights(policy, tmp_path)
    other = load_policy(folder, rank, precision, "cpu")
    load_weights(other, tmp_path)
    for p, q in zip(policy.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert torch.equal(gather(p.detach()), q)
