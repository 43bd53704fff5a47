"""What one GPU cannot hold, shared by all: FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks for it.

    accelerate launch --config_file config/fsdp/sdxl.yaml train.py --config ...

Each process keeps a share of the denoiser's weights and gathers a block's when the block runs. What is trained in full
is a DTensor, and so are its gradients (summed over the processes), Adam's moments, the moving average and the base
model's weights. A LoRA is small: it stays whole in every process, as without FSDP, and only what it stands on is
shared. T5 is shared, too; other text encoders, the VAE and the rewards' models stay whole.

Gathering takes all processes. So each must pass through the network as often as the others.
"""

import os
import warnings
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddpo.errors import InputError
from ddpo.losses import ALGORITHMS

REFUSED = {  # setting of the launcher -> values that ask for what is done anyway; what to do instead of others
    "FSDP_VERSION": (("2",), "launch with --fsdp_version 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true",), "leave it true"),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "use TRANSFORMER_BASED_WRAP"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "a LoRA and --config.precision=bf16 need less memory"),
    "FSDP_STATE_DICT_TYPE": (("FULL_STATE_DICT",), "checkpoints are whole files, for any number of processes"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "use --config.train.gradient_checkpointing=True"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "use --config.train.gradient_checkpointing=True"),
    "FSDP_IGNORED_MODULES": ((), "leave it out"),
}


class Sharding(NamedTuple):
    blocks: tuple  # names of the classes whose modules are gathered one by one; () for those that diffusers names


def requested(config):
    """The Sharding that the launcher asks for, or None. To be asked once, before accelerate is: from then on no library
    sees the request, as transformers would leave the text encoders of all processes but one without weights.

    Raises InputError, with what to use instead, for what is not done.
    """
    env = os.environ
    if env.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    for name, (fitting, instead) in REFUSED.items():
        value = env.get(name, "1" if name == "FSDP_VERSION" else None)
        if value is not None and value.lower() not in [word.lower() for word in fitting]:
            raise InputError(f"accelerate launch's {name.lower()} = {value} is not supported: {instead}")
    for wrong, what in (
        (config.compile, "config.compile"),
        (config.precision == "fp16", "config.precision = fp16: use bf16"),
        (
            not config.choices and getattr(ALGORITHMS.get(config.algorithm), "skips_zeros", False),
            f"config.algorithm = {config.algorithm}, by which processes have unlike numbers of samples to train on: "
            "use another",
        ),
    ):
        if wrong:
            raise InputError(f"FSDP does not go with {what}")
    env["ACCELERATE_USE_FSDP"] = "false"
    blocks = tuple(filter(None, env.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").replace(" ", "").split(",")))
    return Sharding(blocks) if int(env.get("WORLD_SIZE", 1)) > 1 else None


def shard(network, sharding, device, dtype, whole):
    """Shards the weights of a network in place, onto the device. dtype: of its passes, None for the weights'
    own. whole: parameters that stay as they are. Raises InputError if it has none of the blocks that were named."""
    names = sharding.blocks or tuple(network._no_split_modules)
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    for name in set(names) - {type(block).__name__ for block in blocks} if sharding.blocks else ():
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap: {type(network).__name__} has no {name}, but "
            + ", ".join(network._no_split_modules)
        )
    options = {
        "mesh": init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),)),
        # Inputs are cast where the network itself wants it: timesteps of half precision would be others.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": True,  # all: otherwise a pass after an update would use the weights from before it
        "ignored_params": set(whole),
    }
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing changes in place
    for module in [*reversed(blocks), network]:  # the inner ones first
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)  # the sum over the processes, and not their mean
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(parameters):
    """Whether parameters are DTensors, each process holding a share."""
    return isinstance(parameters[0], DTensor)


def local(tensor):
    """This process's part of a tensor, which may be all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(value):
    """A copy of nested dicts and lists in which sharded tensors are whole, on the host: for process 0; the others, who
    must call it too, get None in their place."""
    if isinstance(value, DTensor):
        whole = value.detach().full_tensor()
        return whole.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    return [gather(item) for item in value] if isinstance(value, list) else value


@torch.no_grad()
def spread(value, parameter):
    """A whole tensor as the parameter is kept: this process's share, if that is sharded, and in the same layout."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def class_of(network):
    """A network's class, before it was sharded."""
    return type(network).__bases__[1] if isinstance(network, FSDPModule) else type(network)


def gather_network(network):
    """A network that is whole, on the host, with a sharded one's weights: for process 0; the others, who must call it
    too, get None."""
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        whole = class_of(network).from_config(network.config)
    whole.load_state_dict(state, assign=True)
    return whole
