"""Signals: Ctrl-C and a scheduler's SIGTERM end a run after it is saved, and a launcher's death ends its process."""

import ctypes
import os
import signal
import time

import torch


class Interrupt:
    """Notes SIGINT (Ctrl-C) and SIGTERM (a scheduler) instead of dying of them, so that the loop can save first. A
    second one, a second or more later, ends the process at once."""

    def __init__(self):
        self.signal, self._when = None, 0.0
        self.stopped = False  # all processes have agreed to stop for it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal is None:
            self.signal, self._when = signal.Signals(number), time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # os.write: a signal may arrive in the middle of a print
                os.write(2, b"\nstopping: the updates of this epoch are finished first, then the run is saved. "
                         b"Once more to stop at once\n")  # fmt: skip
        elif time.monotonic() - self._when > 1:  # a launcher passes on what the terminal has sent already
            os._exit(128 + number)

    def any(self, accelerator, failed=False):
        """Whether any process got one, or has `failed`. All processes must ask equally often: they answer together."""
        asked = [self.signal is not None, failed]
        if accelerator.num_processes > 1:
            asked = accelerator.reduce(torch.tensor(asked, dtype=torch.float32, device=accelerator.device)).tolist()
        self.stopped = asked[0] > 0
        return any(asked)

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
