"""What makes training a run: its processes and devices, its folder, interrupts, checkpoints, logs, and looks at the
policy on fixed prompts and noise. `train.py` is the algorithm; nothing here computes a gradient."""

import contextlib
import os
import time

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ddpo.checkpoint import load_checkpoint, save_checkpoint, truncate_metrics
from ddpo.errors import InputError
from ddpo.evaluation import draw_grid
from ddpo.hardware import peak_memory_gb, use_cpu
from ddpo.interrupt import Interrupt
from ddpo.likelihood import batches_differ
from ddpo.options import check, record_inputs, record_options
from ddpo.rewards import reward_models
from ddpo.sharding import is_sharded, requested
from ddpo.tracking import Stopwatch, log_metrics, start_tracker

RATIO_WARNING = (
    "warning: before any update the ratio is off by {:.2g}, more than clip_range = {:g}: training sees another policy "
    "than sampling did. Random layers (dropout) or kernels do that, and any code that treats the two differently"
)
_locks = []  # open for as long as the process lives


class Run:
    """One run of `train.py`. Its methods are called by all processes alike; process 0 writes."""

    def __init__(self, config, preset, command="accelerate launch train.py"):
        """Checks the options' values and finds the processes, the device and the folder. command: what resumes it."""
        self.command, self.sharding = command, requested(config)
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
        check(config, PartialState(cpu=on_cpu).num_processes)
        self.config = config
        folder = config.resume or config.run_dir or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = broadcast_object_list([folder])[0]  # clocks differ
        self.accelerator = Accelerator(log_with=config.tracker or None, project_dir=self.folder)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.device.type == "cpu":
            threads = use_cpu(config.threads, self.processes)
            self.print(f"on the CPU: {self.processes} process(es) with {threads} thread(s) each")
        self.done = 0  # epochs that the weights have been trained for
        self.saved = None  # epochs in the newest checkpoint

    def print(self, message):
        self.accelerator.print(message)

    def start(self, policy, optimizer, tracker, prompt_set, evaluate=None):
        """Resumes from the newest checkpoint, if `config.resume` says so, and writes the first files and images.

        Args:
            policy, optimizer, tracker: what a checkpoint holds.
            prompt_set: the (prompt, metadata) pairs, for the image grids.
            evaluate: function without arguments that measures the policy, or None.
        """
        config, self.policy, self.optimizer, self.tracker = self.config, policy, optimizer, tracker
        self.prompt_set, self.evaluate = prompt_set, evaluate
        if config.resume:
            self.done = self.saved = load_checkpoint(self.folder, policy, optimizer, tracker)
            if self.done >= config.num_epochs:
                raise InputError(
                    f"{self.folder} has done {self.done} epochs: to go on, --config.num_epochs={2 * self.done}"
                )
        elif self.is_main and os.path.exists(os.path.join(self.folder, "metrics.jsonl")):
            raise InputError(
                f"{self.folder} holds a run: continue it with --config.resume={self.folder}, or choose another folder"
            )
        check_processes_agree(self.accelerator, policy.trainable_parameters(), self.done)
        if self.is_main:
            try:
                os.makedirs(os.path.join(self.folder, "images"), exist_ok=True)
            except OSError as error:
                raise InputError(f"run_dir {self.folder!r} cannot be made: {error}") from error
            lock_run(self.folder)
            record_options(self.folder, config)
            record_inputs(self.folder, prompt_set, config.model, reward_models(config.reward))
            truncate_metrics(self.folder, self.done)
        start_tracker(self.accelerator, self.folder, config)
        self.interrupt = Interrupt()

    def describe(self, prompt_count, samples_per_update, trained_steps, rescores):
        """Says in a few lines what the run is about to do."""
        config, options = self.config, self.config.train
        weights = sum(p.numel() for p in self.policy.trainable_parameters()) / 1e6
        method = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "full finetuning"
        precision = config.precision + (", sharded" if self.sharding else "")
        self.print(
            f"{self.folder}: {config.reward} on {config.prompts} ({prompt_count} prompts), {config.algorithm}, "
            f"{method} of {config.model} ({weights:.2f}M weights), {precision}\n"
            f"epochs {self.done} to {config.num_epochs - 1}, each {config.sample.images_per_epoch} images of "
            f"{config.sample.num_steps} steps, {options.updates_per_epoch * options.inner_epochs} updates of "
            f"{samples_per_update} x {trained_steps} transitions"
        )
        if rescores and batches_differ(config, samples_per_update // self.processes):
            self.print(
                "sample.batch_size and train.batch_size compose batches differently, so old log-probs are computed "
                "again, which takes a forward pass. Equal sizes that divide "
                f"{samples_per_update // self.processes}, or 0 for both, spare it"
            )

    def epochs(self):
        """The epochs still to do, under a progress bar."""
        if self.done == 0:
            self._look(0, True, True)
        bar = tqdm(range(self.done, self.config.num_epochs), "epochs", self.config.num_epochs, initial=self.done,
                   unit="epoch", disable=not self.is_main)  # fmt: skip
        for epoch in bar:
            self.clock, self.policy.passes = Stopwatch(), 0
            yield epoch

    def bar(self, total, label):
        """A progress bar within an epoch, in steps."""
        return tqdm(total=total, desc=label, unit="step", leave=False, disable=not self.is_main)

    def stopping(self, failed=False):
        """Whether any process was interrupted or has `failed`: all processes ask together, and stop together."""
        return self.interrupt.any(self.accelerator, failed)

    def collect(self, scores):
        """The rewards of a `rewards.RewardQueue`, when all are there. If a reward failed in any process, saves what
        stands and raises its InputError in all of them, since no weight has changed since the last epoch."""
        failures = gather_object([str(error) for error in scores.errors()])
        if failures:
            if self._save():
                failures[0] += f". Saved after {self.done} epochs; to go on: --config.resume={self.folder}"
            raise InputError(failures[0])
        return scores.result()

    def mean_info(self, info):
        """{name: mean over the epoch's images} of a reward's info, {name: (N,)} in each process."""
        parts = gather_object([{key: float(value.sum()) for key, value in info.items()}])
        return {key: sum(part[key] for part in parts) / self.config.sample.images_per_epoch for key in info}

    def log(self, metrics):
        """Ends an epoch: appends its metrics to metrics.jsonl and to the tracker, draws, measures and saves if due."""
        config, epoch = self.config, self.done
        check_processes_agree(self.accelerator, self.policy.trainable_parameters(), epoch + 1)
        self.clock.lap("seconds_training")
        self.done += 1
        images = config.sample.images_per_epoch
        metrics = {
            "epoch": epoch,
            **({"reward_queries": self.done * images} if config.reward else {}),
            "network_passes": self.policy.passes * self.processes,
            **metrics,
            **self.clock.seconds,
            "images_per_second": images / self.clock.seconds["seconds"],
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        if self.is_main:
            log_metrics(self.accelerator, self.folder, metrics)
            shown = ("loss", "accuracy") if not config.reward else ("reward_mean", "reward_std", "kl_old")
            shown += ("clip_fraction", "ratio_error", "grad_norm", "seconds")
            tqdm.write(f"epoch {epoch:3d}  " + "  ".join(f"{k} {metrics[k]:.4g}" for k in shown if k in metrics))
            if metrics.get("ratio_error", 0) > config.train.clip_range:
                tqdm.write(RATIO_WARNING.format(metrics["ratio_error"], config.train.clip_range))
        last = self.done == config.num_epochs
        save = last or self.done % config.save_every == 0
        due = [last or (every and self.done % every == 0) for every in (config.grid_every, config.evaluate.every)]
        looked = False
        if self.policy.sharding and (save or due[1]):  # or a process whose judge fails would be alone in gathering
            self._save()
        try:
            self._look(self.done, *due)
            looked = True
        finally:  # a judge that only measures must not cost the epochs since the last checkpoint
            if not looked or save:
                self._save()
        self.accelerator.wait_for_everyone()

    def finish(self):
        """Ends the run: saves first if it was interrupted, and then ends as the signal would have."""
        if self.interrupt.stopped:
            self._save()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.interrupt.stopped:
            resume = f"{self.command} --config.resume={self.folder}"
            self.interrupt.exit(f"saved after {self.done} epochs. To go on: {resume}")
        self.print(
            f"done: {self.folder} holds metrics.jsonl, images/ and checkpoints/.\n"
            f'Base and finetuned side by side: python -m scripts.sample --run {self.folder} --prompts "a cat"'
        )

    def _save(self):
        """Saves the weights as they are after `done` epochs, unless that is done or there is nothing to save. Returns
        whether there is such a checkpoint."""
        gathers = is_sharded(self.policy.trainable_parameters())
        if (self.is_main or gathers) and self.done and self.saved != self.done:
            state, keep = (self.policy, self.optimizer, self.tracker), self.config.keep_checkpoints
            save_checkpoint(self.folder, self.done, *state, keep, writes=self.is_main)
        self.saved = self.done
        return self.done > 0

    def _look(self, epoch, grid, measure):
        """Draws and measures images of the same prompts and noise as in every epoch."""
        config, measure = self.config, measure and self.evaluate
        with self.policy.averaged() if grid or measure else contextlib.nullcontext():
            if grid:
                path = os.path.join(self.folder, "images", f"epoch_{epoch:04d}.png")
                picture = draw_grid(self.policy, self.prompt_set, config.grid_images, config.sample, config.seed)
                if self.is_main:
                    picture.save(path)
            if measure:
                measured = self.evaluate()
                if self.is_main:
                    log_metrics(self.accelerator, self.folder, {"epoch": epoch, **measured}, "evaluation")


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


def check_processes_agree(accelerator, parameters, epoch):
    """Raises InputError naming the processes whose weights are not those of process 0 to the bit, or that are at
    another epoch. Costs one pass over the weights: the sum of each one's bits, read as integers. Of sharded ones there
    is no second copy to compare."""
    if accelerator.num_processes == 1:
        return
    whole = [] if is_sharded(parameters) else parameters
    sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in whole]
    states = gather_object([(epoch, torch.stack(sums).tolist() if sums else sums)])
    others = [rank for rank, state in enumerate(states) if state != states[0]]
    if others:
        raise InputError(
            f"before epoch {epoch}, process(es) {', '.join(map(str, others))} hold other weights than process 0: "
            "training would be meaningless. Do all of them read the same run folder and run the same code?"
        )
