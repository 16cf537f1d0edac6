"""Programs and processes that tests start: waited for until they end, and shown with all they printed if they fail.

Nothing here asserts on time. `PATIENCE` only ends a process that hangs, and is long enough for a loaded machine.
"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkout import IMPORT_PATH, ROOT

PATIENCE = 900  # seconds


def environment(**more):
    """Of a program that imports this checkout, one thread to a process; `more` is added, without what is None."""
    paths = os.pathsep.join(filter(None, (IMPORT_PATH, os.environ.get("PYTHONPATH"))))
    whole = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}
    return {name: str(value) for name, value in whole.items() if value is not None}


def launcher(processes):
    """Arguments of Python that start so many processes of what follows; torchrun finds a free port itself."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run(*arguments, processes=1, code=0, env=None, cwd=ROOT):
    """Runs Python with these arguments to its end: what it printed, as subprocess.run has it.

    processes  how many of it run side by side, under torchrun
    code       the exit code it must have; None: any
    env        default: `environment()`
    """
    command = [sys.executable, *launcher(processes), *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment() if env is None else env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        end_group(process.pid)
        out, err = process.communicate()
        fail(f"{command} had not ended after {PATIENCE} s", {"stdout": out, "stderr": err})
    if code is not None and process.returncode != code:
        fail(f"{command} ended with exit code {process.returncode}", {"stdout": out, "stderr": err})
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_group(pid):
    """Kills a process that leads a group, with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def fail(message, printed):
    """Fails the test with all that each process or stream has printed."""
    parts = [f"--- {name}\n{text.rstrip() or '(nothing)'}" for name, text in printed.items()]
    pytest.fail("\n".join([message, *parts]), pytrace=False)


def wait_until(condition, process=None, printed=dict):
    """Waits for an event that another process brings about, such as a file that it makes.

    process  a Popen or Worker, without which the event will not come
    printed  called if it does not come: what the processes have printed, by name
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        ended = process is not None and process.poll() is not None
        if (ended and not condition()) or time.monotonic() > end:
            fail("the process has ended without it" if ended else f"nothing in {PATIENCE} s", printed())
        time.sleep(0.01)


@contextlib.contextmanager
def reserved_port():
    """A port that no other process is given meanwhile, and that a rendezvous can still listen on."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("localhost", 0))  # bound, not listening: with SO_REUSEADDR another socket may listen there
        yield held.getsockname()[1]


def run_script(path, *arguments, processes=1, folder, **variables):
    """Runs a script of the checkout in processes forked from one that has imported everything: no ten seconds to begin.

    processes  ranks, side by side, which meet at a port of their own
    folder     where what they print is kept
    variables  of the environment; without those that are None

    Returns what process 0 has printed.
    """
    return _in_ranks(_script, (ROOT / path, *arguments), processes, folder, variables)


def run_fastdpo(*words, processes=1, folder, **variables):
    """`fastdpo` with these words, as `run_script` runs a script: what process 0 printed."""
    return _in_ranks(_command, words, processes, folder, variables)


def _in_ranks(function, words, processes, folder, variables):
    with ranks_of(processes) as ranks:
        workers = [Worker(folder, function, list(map(str, words)), {**variables, **rank}) for rank in ranks]
        end_all(*workers)
    return workers[0].printed()


@contextlib.contextmanager
def ranks_of(processes):
    """The environment of each of so many ranks."""
    if processes == 1:
        yield [{}]
        return
    with reserved_port() as port:
        world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
        yield [{**world, "MASTER_PORT": port, "RANK": n, "LOCAL_RANK": n} for n in range(processes)]


def _command(words, variables):
    from fastdpo.cli import main

    _set(variables)
    sys.exit(main(words))


def _set(variables):
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = str(value)


def _script(words, variables):
    _set(variables)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Worker:
    """A function that runs in a process of its own, with the environment of now."""

    def __init__(self, folder, function, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["forked_from"])
        self.path = folder / f"printed-{next(_numbers)}.txt"
        arguments = (self.path, dict(os.environ), function, arguments)
        self.process = context.Process(target=_with_output_in, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
                patch.setenv(name, environment()[name])  # of the process that is forked from, which starts now
            self.process.start()

    def poll(self):
        """The exit code; None while it runs."""
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def printed(self):
        return self.path.read_text() if self.path.exists() else ""

    def end(self, *codes):
        """Waits for its end: the exit code, which must be one of `codes` (default 0; -n where signal n ended it)."""
        return end_all(self, codes=codes or (0,))[0]


def end_all(*workers, codes=(0,)):
    """Waits for their ends: the exit codes. Where one is not among `codes`, the others are killed and all are shown."""
    end = time.monotonic() + PATIENCE
    running = list(workers)
    while running:
        multiprocessing.connection.wait([each.process.sentinel for each in running], timeout=end - time.monotonic())
        failed = [each for each in workers if each.poll() not in (None, *codes)]
        running = [each for each in running if each.poll() is None]
        if failed or time.monotonic() > end:
            what = f"ended with exit code {failed[0].poll()}" if failed else f"had not ended after {PATIENCE} s"
            for worker in running:
                worker.kill()
            fail(f"a process {what}", {f"process {n}": each.printed() for n, each in enumerate(workers)})
    return [each.poll() for each in workers]


_numbers = itertools.count()


def _with_output_in(path, variables, function, arguments):
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(variables)
    function(*arguments)
