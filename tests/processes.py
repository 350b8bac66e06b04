"""Several processes for a test, forked from this one, which spares them the imports."""

import multiprocessing
import os
import signal
import socket
import tempfile
import traceback

import torch


def fork(world, function, *args):
    """Call function(*args) in `world` processes that find each other as torchrun's do -> what the first one returned."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]

    def child(rank, path):
        signal.alarm(100)  # rather than wait for ever for one that failed
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
