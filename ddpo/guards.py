"""What keeps a run from being lost or silently wrong: interrupts, one writer per run, processes that agree."""

import ctypes
import os
import signal
import time

import torch
from accelerate.utils import gather_object

from ddpo.errors import InputError

RATIO_WARNING = (
    "warning: before any update the ratio is off by {:.2g}, more than clip_range = {:g}: training sees another policy "
    "than sampling did. Random layers (dropout) or kernels do that, and any code that treats the two differently"
)
_locks = []  # open for as long as the process lives


class Interrupt:
    """Notes SIGINT (Ctrl-C) and SIGTERM (a scheduler) instead of dying of them, so that the loop can save first. A
    second one, a second or more later, ends the process at once."""

    def __init__(self):
        self.signal, self._when = None, 0.0
        self.stopped = False  # all processes have agreed to stop
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal is None:
            self.signal, self._when = signal.Signals(number), time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # os.write: a signal may arrive in the middle of a print
                os.write(2, b"\nstopping: the updates of a round are finished first, then the run is saved. "
                         b"Once more to stop at once\n")  # fmt: skip
        elif time.monotonic() - self._when > 1:  # a launcher passes on what the terminal has sent already
            os._exit(128 + number)

    def any(self, accelerator):
        """Whether any process got one. All processes must ask equally often: they answer together."""
        self.stopped = self.signal is not None
        if accelerator.num_processes > 1:
            self.stopped = accelerator.reduce(torch.tensor(float(self.stopped), device=accelerator.device)).item() > 0
        return self.stopped

    def exit(self, message):
        """Ends the process as the signal would have, with a last line from process 0."""
        number = self.signal or signal.SIGTERM  # None: only another process got it
        if os.environ.get("RANK", "0") == "0":
            print(f"{number.name}: {message}", flush=True)
        raise SystemExit(128 + number)


def die_with_launcher():
    """SIGTERM to `accelerate launch` kills the launcher alone and leaves its training process behind; on Linux that
    process can ask to get a SIGTERM of its own when its parent dies."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.path.exists("/proc/self"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lock_run(run_dir):
    """Keeps a second process from writing to the same run; the lock ends with this process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    lock = open(os.path.join(run_dir, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{run_dir} is being written by another process, which still runs") from None
    except OSError:  # a file system without locks
        pass
    _locks.append(lock)


def blame_gradient(where, parameters, transitions, loss_of, name_of):
    """Raises the InputError of an update whose gradient is not finite, which names the first culprit of any process.
    transitions: this process's, one by one, each the arguments of `loss_of`, its loss (1,), and of `name_of`."""
    culprits = []
    for transition in transitions:
        for p in parameters:
            p.grad = None
        loss = loss_of(*transition)
        loss.sum().backward()
        if not all(p.grad.isfinite().all() for p in parameters if p.grad is not None):
            culprits.append(f"{name_of(*transition)} (loss {float(loss):.4g})")
            break
    culprits = gather_object(culprits) or ["no transition of its own, only in their sum"]
    raise InputError(
        f"{where}: the gradient is not finite at {culprits[0]}. Stopped before it reached the weights; a lower "
        "train.learning_rate or a higher precision may help"
    )


def check_processes_agree(accelerator, parameters, epoch):
    """Raises InputError naming the processes whose weights are not those of process 0 to the bit, or that are at
    another epoch. Costs one pass over the weights: the sum of each one's bits, read as integers."""
    if accelerator.num_processes == 1:
        return
    sums = [int(s) for s in torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in parameters])]
    states = gather_object([(epoch, sums)])
    others = [rank for rank, state in enumerate(states) if state != states[0]]
    if others:
        raise InputError(
            f"before epoch {epoch}, process(es) {', '.join(map(str, others))} hold other weights than process 0: "
            "training would be meaningless. Do all of them read the same run folder and run the same code?"
        )
