"""The optimizer of an update: AdamW with a warm-up, clipping by global norm, and loss scaling in fp16. To try another
one, change `make_optimizer`; parameter groups with learning rates of their own are warmed up and resumed alike."""

from itertools import accumulate, groupby

import torch
from accelerate.utils import gather_object

from ddpo.errors import InputError
from ddpo.sharding import is_sharded, local, spread

BUCKET = 2**24  # gradients summed over processes at a time: 64 MB


def make_optimizer(parameters, options):
    """AdamW. options: `config.train`."""
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=True,
    )


class Optimizer:
    """An update is: `backward` of each minibatch's share of the loss, then `clip`, then `step`."""

    def __init__(self, parameters, config, accelerator):
        self.parameters, self.options, self.accelerator = parameters, config.train, accelerator
        self.adam = make_optimizer(parameters, config.train)
        for group in self.adam.param_groups:
            group["peak_lr"] = group["lr"]  # what the warm-up rises to
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self.loss = 0.0  # of this process's share of the update so far
        self.grad_norms = []

    def backward(self, loss):
        """Adds the gradient of a part of the update's loss."""
        self.scaler.scale(loss).backward()
        self.loss = self.loss + loss.detach()

    def clip(self):
        """Sums the gradient over the processes and clips its global norm. Returns whether the gradient is fit for
        `step`: it is not if it is not finite, unless the loss is and fp16's scaled gradient has merely overflowed, as
        it does now and then; the scaler then skips the step and scales less from there on."""
        sharded = is_sharded(self.parameters)  # FSDP has summed such gradients in the backward passes
        if self.accelerator.num_processes > 1 and not sharded:
            self.sum_over_processes()
        self.scaler.unscale_(self.adam)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        norm = norm.full_tensor() if sharded else norm
        if norm.isfinite():
            self.grad_norms.append(float(norm))
            return True
        scaled = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        return scaled and bool(self.accelerator.reduce(self.loss).isfinite())

    def sum_over_processes(self):
        """Of the gradient, in few messages: hundreds of small ones cost their latency. Once an update, after all of its
        backward passes, so that there is little that they could overlap with (docs/gpu.md)."""
        ends = accumulate(p.numel() for p in self.parameters)
        for _, bucket in groupby(zip(ends, self.parameters), lambda pair: pair[0] // BUCKET):
            gradients = [p.grad for _, p in bucket]
            total = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
            for gradient, part in zip(gradients, total.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    def step(self, updates_done):
        """Updates the weights. updates_done: in all epochs before; the learning rate rises linearly over the first
        `warmup_updates`, since Adam's first steps move every weight by all of it, however small its gradient."""
        for group in self.adam.param_groups:
            group["lr"] = group["peak_lr"] * min(1, (updates_done + 1) / max(1, self.options.warmup_updates))
        self.scaler.step(self.adam)
        self.scaler.update()
        self.discard()

    def discard(self):
        """Forgets the gradient of an update that is not to be made."""
        self.adam.zero_grad()
        self.loss = 0.0

    def summary(self):
        """Of the updates since this was last asked for: their number, and the mean norm before clipping."""
        norms, self.grad_norms = self.grad_norms, []
        return {"updates": len(norms), "grad_norm": sum(norms) / max(1, len(norms))}

    def state_dict(self):
        return {"optimizer": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Takes on the moments and the loss scale of a saved state, and keeps the options that it was made with."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.adam.param_groups]
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        moments = {  # in the layout of the weights, which may be sharded, or were when they were saved
            i: {k: spread(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in values.items()}
            for i, values in state["optimizer"]["state"].items()
        }
        self.adam.load_state_dict(state["optimizer"] | {"state": moments})
        for group, options in zip(self.adam.param_groups, own, strict=True):
            group.update(options)
        if state["scaler"]:  # else the saved run had another precision
            self.scaler.load_state_dict(state["scaler"])


def blame_gradient(where, parameters, minibatches, loss_of, describe, size=1):
    """Raises the InputError of an update whose gradient is not finite, which names the first culprit of any process.

    Args:
        minibatches: this process's, each a tuple of index tensors; they are tried sample by sample, or `size` at once.
        loss_of: function of such a tuple that returns its losses and something else.
        describe: function of such indices that names the sample.
    """
    singles = [single for batch in minibatches for single in zip(*(indices.split(size) for indices in batch))]
    culprits = ["no transition of its own, only in their sum"]
    for k in range(max(gather_object([len(singles)]))):  # all processes together, as sharded networks want it
        found = []
        if k < len(singles):
            for p in parameters:
                p.grad = None
            loss = loss_of(*singles[k])[0]
            loss.sum().backward()
            finite = all(local(p.grad).isfinite().all() for p in parameters if p.grad is not None)
            found = [(finite, f"{describe(*singles[k])} (loss {float(loss.sum()):.4g})")]
        found = gather_object(found)
        if not all(finite for finite, _ in found):  # a sharded gradient is the sum of all processes'
            culprits = [name for finite, name in found if not finite or is_sharded(parameters)]
            break
    culprit = " or ".join(culprits) if is_sharded(parameters) else culprits[0]
    raise InputError(
        f"{where}: the gradient is not finite at {culprit}. Stopped before it reached the weights; a lower "
        "train.learning_rate or a higher precision may help"
    )
