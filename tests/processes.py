"""Running a script in this process, a function in several, and reading what a run has logged."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback

import torch

from minit2i.plot import read_log

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def call(script, flags):
    """Run a script's main() in this process with a string of flags."""
    handlers, argv = [signal.getsignal(s) for s in SIGNALS], sys.argv
    sys.argv = [script.__name__, *flags.split()]
    try:
        script.main()
    finally:
        sys.argv = argv
        for s, handler in zip(SIGNALS, handlers):
            signal.signal(s, handler)


def fork(world, function, *args):
    """Call function(*args) in `world` processes that find each other as torchrun's do -> the result of rank 0.

    They are forked from this one, which saves the imports.
    """
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]

    def child(rank, path):
        signal.alarm(100)  # a process whose peer failed would wait for hours
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        try:
            result = function(*args)
            if rank == 0:
                torch.save(result, path)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/result"
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(rank, path)) for rank in range(world)]
        for c in children:
            c.start()
        for c in children:
            c.join()
        assert not any(c.exitcode for c in children)
        return torch.load(path, weights_only=False)


def losses(folder):
    """[(step, loss, gradient norm)] of a run's log."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(folder / "log.jsonl") if "loss" in r]


class Evil:
    """Runs code when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/ran",)
