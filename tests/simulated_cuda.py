"""train.py on a GPU that is not there: `python tests/simulated_cuda.py`, with the command line of train.py.

Tensors that are made on "cuda" or copied to it say that they are there and hold their numbers on the CPU. So the code
takes the paths that it takes on a GPU, CUDA's autocast among them, and what a GPU would refuse is an error here:
tensors of two devices in one operation, mixed precisions in a kernel that a CPU would let pass, and in collectives
tensors that NCCL could not send. What makes the host wait for a GPU (reading a value, copying from it, or to it from
memory that is not pinned, an operation whose output's size depends on values) ends the run with an error that names the
line, if it happens within a step: from a network's first call to the end of the denoising loop, or of an update's
minibatches.

Not simulated: streams, memory, speed, and the rounding of a GPU's kernels. SIMULATE=NAME of MISTAKES breaks the code.
"""

import ctypes
import os
import runpy
import subprocess
import sys
import traceback

if "SIMULATED_CUDA" in os.environ:  # the library of `build`, before torch, which asks at once whether there is a GPU
    ctypes.CDLL(os.environ["SIMULATED_CUDA"], ctypes.RTLD_GLOBAL)

import safetensors.torch
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
aten = torch.ops.aten
# Operations whose output's size depends on values: the host must wait to know it.
READING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "equal"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
inside_step = False
waits = []  # the lines that waited within a step


class GPUTensor(torch.Tensor):
    """Says that it is on the GPU; its numbers are in `held`, a CPU tensor."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        held = held.detach()
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.data.__set__:
            tensor, new = args
            if not isinstance(new, GPUTensor):
                raise RuntimeError("incompatible tensor type: .data of a CUDA tensor set to a CPU tensor")
            with torch._C.DisableTorchFunctionSubclass():
                function(tensor, new)
            tensor.held = new.held
            return None
        if function in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr):  # by which tensors are told apart
            return function(args[0].held)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function is torch.Tensor.tolist:
            wait("tolist")
            return args[0].held.tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                wait("an index that is a list")
                index = tuple(GPUTensor(torch.tensor(i)) if isinstance(i, list) else i for i in index)
                args = (args[0], index, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    def __repr__(self):
        return f"GPUTensor({self.held})"

    def __reduce_ex__(self, protocol):
        wait("pickle")
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = GPUTensor(self.held.clone(), self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return memo[id(self)]


def wait(what):
    """Notes that the host waits for the GPU, if that is within a step."""
    if inside_step:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith((ROOT, "train.py"))]
        own = [f for f in frames if f.filename != os.path.abspath(__file__)]
        waits.append(f"{what} at {os.path.basename(own[-1].filename)}:{own[-1].lineno} {own[-1].line}")


def convert(function, value):
    """Applies a function to the tensors of nested lists, tuples and dicts. (torch's tree_map takes most of a run.)"""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([convert(function, v) for v in value])
    return {k: convert(function, v) for k, v in value.items()} if isinstance(value, dict) else value


def hold(tensor):
    return tensor.held if isinstance(tensor, GPUTensor) else tensor


def give(tensor):
    return tensor if isinstance(tensor, GPUTensor) else GPUTensor(tensor)


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def compute(function, args, kwargs):
    """An operation of torch, as a GPU would take or refuse it."""
    name, device = function._schema.name.removeprefix("aten::"), kwargs.get("device")
    mine, others = [], []
    convert(lambda t: (mine if isinstance(t, GPUTensor) else others).append(t), (args, kwargs))
    if not mine and not on_gpu(device):
        return function(*args, **kwargs)
    held_args, held_kwargs = convert(hold, args), convert(hold, kwargs)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if on_gpu(device):
        held_kwargs["device"] = "cpu"
    if name == "_local_scalar_dense":
        wait("reading a value")
        return function(*held_args)
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        target_on_gpu = isinstance(args[0], GPUTensor) if name == "copy_" else device is None or on_gpu(device)
        pinned = getattr(source, "pinned", False) and (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        if isinstance(source, GPUTensor) != target_on_gpu and source.numel() and not (target_on_gpu and pinned):
            wait(f"a copy {'to' if target_on_gpu else 'from'} the device")
        result = function(*held_args, **held_kwargs)
        return args[0] if name == "copy_" else give(result) if target_on_gpu else result
    if name in READING:
        wait(name)
    if name in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if not isinstance(args[0], GPUTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, GPUTensor) for i in indices):
            wait("an index by a mask, or from the CPU")
    elif any(t.dim() for t in others) or (name in ("stack", "cat") and mine and others):
        shape = tuple(others[0].shape)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name}, "
            f"of a CPU tensor of shape {shape})"
        )
    if name.startswith(("native_group_norm", "native_layer_norm")) and len({t.dtype for t in mine}) > 1:
        raise RuntimeError(f"{name}: mixed dtypes {[t.dtype for t in mine]}, which CUDA's kernel refuses")
    result = function(*held_args, **held_kwargs)
    if device is not None and not on_gpu(device):
        return result  # new_zeros(device="cpu") and the like
    written = [i for i, a in enumerate(function._schema.arguments) if a.alias_info and a.alias_info.is_write]
    if written and len(function._schema.returns) == 1:  # an operation in place, or with out=, returns its argument
        argument = function._schema.arguments[written[0]]
        return args[written[0]] if written[0] < len(args) else kwargs[argument.name]
    return convert(give, result)


class Factories(TorchDispatchMode):
    """Operations of which no argument is on the GPU, but perhaps the result."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(q k / sqrt(d)) v in float32, as CUDA's kernels accumulate; what they refuse is an error."""
    if not isinstance(query, GPUTensor):
        return cpu_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype: {query.dtype}, {key.dtype}")
    with torch.autocast("cuda", enabled=False):
        scores = query.float() @ key.float().transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return (scores.softmax(-1) @ value.float()).to(query.dtype)


def pin_memory(tensor):
    """A copy in pinned memory, from which a copy to the GPU need not be waited for."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def build(library):
    """Compiles simulated_cuda.cpp, without which autograd has no such device, to a file. Takes two seconds."""
    folder, source = os.path.dirname(torch.__file__), os.path.join(ROOT, "tests/simulated_cuda.cpp")
    command = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{folder}/include", source, "-o", library]
    subprocess.run([*command, f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"], check=True)


def install():
    """Makes torch believe that there is a GPU."""
    global cpu_attention
    cpu_attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.pin_memory = pin_memory
    count = int(os.environ.get("SIMULATED_GPUS", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, value in {
        "is_available": True, "device_count": count, "current_device": DEVICE.index, "_lazy_init": None,
        "is_initialized": True, "set_device": None, "manual_seed": None, "manual_seed_all": None, "empty_cache": None,
        "is_bf16_supported": True, "reset_peak_memory_stats": None, "max_memory_allocated": 10**8, "synchronize": None,
        "get_device_capability": (9, 0), "get_device_name": "simulated", "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "mem_get_info": (80_000, 80_000),
        "get_device_properties": type("Properties", (), {"total_memory": 80_000, "uuid": f"gpu {DEVICE.index}"}),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *args, **kwargs: torch.device("cuda")
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name in ("_evaluate_tensors_for_save", "_flatten_as_ptr"):  # look at the numbers' addresses
        function = getattr(safetensors.torch, name)
        setattr(safetensors.torch, name, lambda *args, function=function: function(*convert(hold, args)))
    install_collectives()
    Factories().__enter__()


def send(tensor):
    if not isinstance(tensor, GPUTensor):
        raise RuntimeError("No backend type associated with device type cpu")
    return tensor.held


def install_collectives():
    """NCCL, which sends what is on GPUs only; here by gloo. Objects go as they would: through tensors on the GPU."""
    start = dist.init_process_group

    def start_gloo(backend=None, device_id=None, **kwargs):
        start("gloo", **kwargs)

    dist.init_process_group = start_gloo
    dist.is_nccl_available = lambda: True
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce"):
        real = getattr(dist, name)

        def collective(*args, real=real, **kwargs):
            return real(*convert(send, args), **convert(send, kwargs))

        setattr(dist, name, collective)


def within_steps(owner, name, begins):
    """Counts waits as mistakes from the start of owner.name on, or no longer from there on and from its end on."""
    function = getattr(owner, name)

    def traced(*args, **kwargs):
        global inside_step
        inside_step = begins
        try:
            return function(*args, **kwargs)
        finally:
            if not begins:
                inside_step = False

    setattr(owner, name, traced)


def main():
    install()
    from ddpo import hardware, likelihood, optimizer, pipeline_logprob, tracking

    if mistake := os.environ.get("SIMULATE"):
        likelihood.predict_noise = MISTAKES[mistake](likelihood.predict_noise)
    within_steps(pipeline_logprob, "predict_noise", True)
    within_steps(likelihood.Rollout, "score", True)
    for owner, name in (
        (pipeline_logprob, "decode"), (likelihood.Rollout, "rescore"), (optimizer.Optimizer, "clip"),
        (tracking.Means, "latest"), (hardware, "_fits"),
    ):  # fmt: skip
        within_steps(owner, name, False)
    sys.argv[0] = "train.py"
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        if end.code or not waits:
            raise
    sys.exit("error: waits within a step: " + "; ".join(sorted(set(waits))))


def cpu_tensor(predict):
    """The timesteps on the CPU, as the scheduler has them."""
    return lambda policy, latents, t, *rest: predict(policy, latents, t.cpu() if inside_step else t, *rest)


def wait_in_step(predict):
    """A look at the latents."""

    def looks(policy, latents, *rest):
        assert latents.isfinite().all()
        return predict(policy, latents, *rest)

    return looks


def mixed_precision(predict):
    """A norm kept in float32 outside of autocast."""

    def mixes(policy, latents, *rest):
        output = predict(policy, latents, *rest)
        return torch.nn.functional.group_norm(
            output.half(), 1, torch.ones(output.shape[1], device=output.device)
        ).float()

    return mixes


MISTAKES = {"a CPU tensor": cpu_tensor, "a wait": wait_in_step, "mixed precision": mixed_precision}
if __name__ == "__main__":
    main()
