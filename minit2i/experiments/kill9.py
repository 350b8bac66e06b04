"""Kill a short run of both stages at random moments, resume each time, and compare with an undisturbed run.

python -m minit2i.experiments.kill9 --kills 20

Needs a checkout and some minutes; not a test of the suite.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Annotated

from safetensors.torch import load_file

from minit2i.config import Settings, at_least, pick
from minit2i.experiments.tokenizers import CHECKOUT
from minit2i.flags import add_flags, new_parser

SHARED = "--data scenes:400 --workers 0 --batch_size 16 --precision fp32"
VQ = f"train_vq.py {SHARED} --image_size 32 --stride 8 --ch 8 --n_res 1 --n_codes 64 --steps 500 --eval_every 7"
PRIOR = f"train_prior.py {SHARED} --n_layer 2 --n_head 2 --n_embd 32 --dropout 0.1 --vocab_size 400"


@dataclass(frozen=True)
class KillConfig(Settings):
    """How to disturb."""

    kills: Annotated[int, "kills of each stage", at_least(1)] = 20
    seed: Annotated[int, "seed of the moments"] = 0


def start(command, env={}, stderr=subprocess.PIPE):
    """Start a training script of this checkout with one thread; env: further variables of the environment."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, *command.split()]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=stderr, env=env)


def finish(command, env={}):
    """Run a command to its end; RuntimeError with what it printed if it fails."""
    run = start(command, env)
    _, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(f"{command} failed:\n{errors.decode()}")


def disturbed(command, rng, kills, window):
    """Run a command again and again, killing it after a time in `window`, until it ends -> number of kills."""
    done = 0
    while True:
        run = start(command)
        try:  # some kills hit the start, some training or saving
            _, errors = run.communicate(timeout=rng.uniform(*window) if done < kills else None)
            if run.returncode:
                raise RuntimeError(f"{command} failed:\n{errors.decode()}")
            return done
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            done += 1


def main():
    parser = new_parser(__doc__)
    add_flags(parser, KillConfig)
    cfg = pick(KillConfig, parser.parse_args())
    rng = random.Random(cfg.seed)
    with tempfile.TemporaryDirectory() as tmp:
        prior = f"{PRIOR} --steps 500 --eval_every 7 --vq {tmp}/vq --cache {tmp}/cache"
        for name, command in (("vq", VQ), ("prior", prior)):
            begin = time.time()
            finish(f"{command} --out {tmp}/{name}")
            length, begin = time.time() - begin, time.time()
            finish(f"{command} --out {tmp}/{name} --resume")  # nothing left to do: the time to start
            startup = time.time() - begin
            window = 0.5 * startup, startup + 1.2 * (length - startup) / cfg.kills
            kills = disturbed(f"{command} --out {tmp}/{name}-killed --resume", rng, cfg.kills, window)
            for file in ("model.safetensors", "state/resume.safetensors"):
                a, b = load_file(f"{tmp}/{name}/{file}"), load_file(f"{tmp}/{name}-killed/{file}")
                assert a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items()), file
            print(f"{name}: killed {kills} times in a run of {length:.0f} s; weights and state bit-equal", flush=True)


if __name__ == "__main__":
    main()
