"""Kill a short run of both stages at random moments, resume each time, and compare with an undisturbed run.

    python tests/kill9.py --kills 20

Not collected by pytest: it takes some minutes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SHARED = (
    "--data scenes --n_scenes 400 --size 32 --workers 0 --batch_size 16 --precision fp32 --eval_every 60 --eval_size 16"
)
VQ = f"train_vq.py {SHARED} --stride 8 --ch 8 --n_res 1 --n_codes 64 --steps 500 --save_every 7"
PRIOR = f"train_prior.py {SHARED} --n_layer 2 --n_head 2 --n_embd 32 --dropout 0.1 --steps 500 --save_every 7 --vocab_size 400"


def start(command):
    return subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as tmp:
        vq = None
        for name, command in (("vq", VQ), ("prior", PRIOR)):
            extra = f" --vq {vq} --cache {tmp}/cache" if vq else ""
            whole, killed = f"{tmp}/{name}", f"{tmp}/{name}-killed"
            begin = time.time()
            assert start(f"{command}{extra} --out {whole}").wait() == 0
            length, kills, begin = time.time() - begin, 0, time.time()
            assert start(f"{command}{extra} --out {whole} --resume").wait() == 0  # it has nothing left to do
            startup = time.time() - begin
            window = 0.5 * startup, startup + 1.2 * (length - startup) / args.kills
            while True:
                run = start(f"{command}{extra} --out {killed} --resume")
                try:  # some while starting, some while training or saving
                    _, errors = run.communicate(timeout=rng.uniform(*window) if kills < args.kills else None)
                    assert run.returncode == 0, errors.decode()
                    break
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                    run.communicate()
                    kills += 1
            for file in ("model.safetensors", "state/resume.safetensors"):
                a, b = load_file(f"{whole}/{file}"), load_file(f"{killed}/{file}")
                assert a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items()), file
            print(f"{name}: killed {kills} times in a run of {length:.0f} s; weights and state bit-equal", flush=True)
            vq = whole


if __name__ == "__main__":
    main()
