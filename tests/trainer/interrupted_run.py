"""Runs in processes of their own, to be interrupted, killed and resumed (test_survival, test_resume).

As a script it imports everything once, then forks a process for every line of JSON on its input: a run is a process
whose Python dies as any other does, and does not take ten seconds to begin.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT
from processes import end_group, environment, fail, reserved_port, wait_until

UNTIMED = ("perf/", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")


# In the test


class Run:
    """A run in one or several processes, started by `start`."""

    def __init__(self, server, folder, options, processes):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._port = reserved_port()  # until this object goes
        port = self._port.__enter__()
        self.pids = []
        for rank in range(processes):
            for name in ("paused", "go", "done", "result.json"):
                (folder / f"{name}-{rank}").unlink(missing_ok=True)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            names = {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port} if processes > 1 else {}
            job = {"folder": str(folder), "rank": rank, "options": options, "environment": names}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            self.pids.append(int(server.stdout.readline()))

    def paused(self, rank=0):
        """Waits until the process has come where it was told to pause."""
        self._wait_for(f"paused-{rank}", rank)

    def _wait_for(self, name, rank):
        try:
            wait_until((self.folder / name).exists, _Process(self.folder / f"done-{rank}"), self._all_said)
        except pytest.fail.Exception:
            for pid in self.pids:  # none is left waiting for another
                end_group(pid)
            raise

    def _all_said(self):
        return {f"process {rank}": self.said(rank) for rank in range(len(self.pids))}

    def send(self, number, rank=0, group=False):
        """`group`: also to the processes that it has started, as a terminal does."""
        (os.killpg if group else os.kill)(self.pids[rank], number)

    def go_on(self):
        for rank in range(len(self.pids)):
            (self.folder / f"go-{rank}").touch()

    def code(self, rank=0):
        """The exit code; -n where signal n ended it, as subprocess has it."""
        self._wait_for(f"done-{rank}", rank)
        return os.waitstatus_to_exitcode(int((self.folder / f"done-{rank}").read_text()))

    def said(self, rank=0):
        path = self.folder / f"said-{rank}.txt"
        return path.read_text() if path.exists() else ""

    def result(self, rank=0):
        """What a run that came to its end has left: `weights`, `history`, `train_loss`."""
        if self.code(rank):
            fail(f"process {rank} ended with exit code {self.code(rank)}", self._all_said())
        return json.loads((self.folder / f"result.json-{rank}").read_text())


class _Process:
    """One that leaves its exit status in a file."""

    def __init__(self, done):
        self.done = done

    def poll(self):
        return 0 if self.done.exists() else None


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "trainer" / "interrupted_run.py")], text=True, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def start(folder, processes=1, **options):
    """A run; see `main` for its options, of which those that are not named there are the config's."""
    return Run(_server(), Path(folder), options, processes)


def history(entries):
    """What was logged, without what depends on the clock."""
    return [{name: value for name, value in entry.items() if not name.startswith(UNTIMED)} for entry in entries]


# In the process


MARK = -128.0


def bad_loss(kind):
    """Registers the loss "marked": `sigmoid`, but for rows whose reference says so (`marked_rows`).

    kind  "nan" (loss and gradient), "inf" (loss only: where the gradient is a number) or "gradient" (gradient only)
    """
    import torch

    import fastdpo

    def marked(terms, *, beta):
        logits = beta * terms.delta
        is_marked = terms.ref_chosen_logps == MARK
        losses = -torch.nn.functional.logsigmoid(logits)
        if kind == "nan":
            return losses * torch.where(is_marked, torch.nan, 1.0)
        if kind == "inf":
            return torch.where(is_marked, torch.inf, losses)
        return losses + (terms.delta - terms.delta.detach()) * torch.where(is_marked, 1e38, 0.0)

    fastdpo.register_loss("marked", marked, overwrite=True)


def marked_rows(rows, marked):
    """With columns of the reference, which in some rows are the mark."""
    return [
        {**row, "ref_chosen_logps": MARK if number in marked else -20.0 - number, "ref_rejected_logps": -20.0}
        for number, row in enumerate(rows)
    ]


def main(folder, rank, options):
    """Trains and leaves result.json. Options that are no config's:

    trainer     "dpo" or "kto"
    model       keywords of tiny_model
    lora        whether an adapter is put on
    rows        how many; streamed: as an IterableDataset; alike: rows that share their prompts by twos
    kl_ids      whether the rows are single answers that bring the answers to other prompts
    marked      numbers of rows whose loss is none; kind: as `bad_loss` has it
    pause_at    in the forward of this step: waits for a signal, and for the file go
    pause_in    the event of a callback in which it waits so, at the step `pause_step`
    resume      a checkpoint, or true
    drop_state  the checkpoint is first made one of another program's
    twice       train() is called again after the first call was interrupted, with this resume_from_checkpoint
    """
    import torch
    from datasets import IterableDataset
    from tiny import random_rows, tiny_model, word_tokenizer
    from transformers import TrainerCallback

    import fastdpo.trainer.metrics as metrics
    from fastdpo import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    torch.set_num_threads(1)
    if not options.pop("real_gemm", False):
        metrics.gemm_flops_per_second = lambda *of: 1e12
    resume, twice = options.pop("resume", None), options.pop("twice", None)
    pause_at, pause_in = options.pop("pause_at", None), options.pop("pause_in", None)
    pause_step = options.pop("pause_step", None)
    rows = random_rows(options.pop("rows", 20), seed=3, prompt=(2, 14))
    if options.pop("alike", False):
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            second["prompt_ids"] = first["prompt_ids"]
    if options.pop("kl_ids", False):
        rows = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0,
             "KL_completion_ids": row["rejected_ids"]}
            for number, row in enumerate(rows)
        ]  # fmt: skip
    if "marked" in options:
        rows = marked_rows(rows, options.pop("marked"))
        bad_loss(options.pop("kind", "nan"))
        options["loss_type"] = "marked"
    if options.pop("streamed", False):
        given = rows
        rows = IterableDataset.from_generator(lambda: iter(given))
    Trainer, Config = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[options.pop("trainer", "dpo")]
    arguments = {}
    if options.pop("lora", False):
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_dropout=options.pop("lora_dropout", 0.0)
        )
    model = tiny_model(**options.pop("model", {}))
    defaults = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3,
        "logging_steps": 1, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "gradient_checkpointing": False,
    }  # fmt: skip
    run = Trainer(
        model, args=Config(**(defaults | options)), train_dataset=rows, processing_class=word_tokenizer(), **arguments
    )

    def pause():
        (folder / f"paused-{rank}").touch()
        while not (folder / f"go-{rank}").exists():
            time.sleep(0.01)

    if pause_at is not None:
        forward = run.compute_loss

        def paused_forward(*args, **kwargs):
            if run.state.global_step + 1 == pause_at and run.model.training:
                pause()
            return forward(*args, **kwargs)

        run.compute_loss = paused_forward
    if pause_in is not None:

        def event(self, args, state, control, **kwargs):
            if state.global_step == pause_step:
                pause()

        run.add_callback(type("Pausing", (TrainerCallback,), {pause_in: event})())
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        output = run.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        if twice is None:
            raise
        pause_at = None
        output = run.train(resume_from_checkpoint=twice)
    finally:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    weights = hashlib.sha256()
    for value in run.model.state_dict().values():
        weights.update(value.detach().numpy().tobytes())
    left = {
        "weights": weights.hexdigest(),
        "history": history(run.state.log_history),
        "train_loss": output.training_loss,
        "steps": run.state.global_step,
    }
    (folder / f"result.json-{rank}").write_text(json.dumps(left))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def serve():
    """A process for each line: its number is printed, and when it has ended, its status written to done-RANK.

    Returns in the process, with its job.
    """
    import gc

    sys.modules["bitsandbytes"] = None  # peft would import it, and it Inductor, for a second and more

    import datasets  # noqa: F401
    import peft  # noqa: F401
    from tiny import tiny_model

    from fastdpo import DPOTrainer, KTOTrainer  # noqa: F401

    tiny_model(), tiny_model("gpt2")
    gc.collect()
    gc.freeze()
    done = {}

    def reap(*of):
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                with contextlib.suppress(FileNotFoundError):  # of a test that has passed without it
                    done[pid].with_suffix(".new").write_text(str(status))
                    done[pid].with_suffix(".new").rename(done[pid])

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        job = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            return job
        done[pid] = Path(job["folder"]) / f"done-{job['rank']}"
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        print(pid, flush=True)
    return None


def _begin(job):
    """The process's own group, output and environment."""
    os.setpgid(0, 0)
    folder, rank = Path(job["folder"]), job["rank"]
    said = os.open(folder / f"said-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.environ.update({name: str(value) for name, value in job["environment"].items()})
    os.environ["FASTDPO_CACHE"] = str(folder / "cache")
    main(folder, rank, job["options"])


if __name__ == "__main__":
    given = serve()
    if given is not None:
        _begin(given)
