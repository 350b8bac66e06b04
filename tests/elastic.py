"""Kill one of four workers at random moments, ten times: torchrun restarts all, they resume by themselves and end as
an undisturbed run does.

    python tests/elastic.py --kills 10 --strategy fsdp

Not collected by pytest: it takes some minutes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill9 import ROOT, SHARED, VQ
from safetensors.torch import load_file

PRIOR = (
    f"train_prior.py {SHARED} --n_layer 2 --n_head 2 --n_embd 32 --dropout 0.1 --steps 400 --save_every 5 --log_every 5 "
    "--vocab_size 400 --resume"
)
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 4 --monitor_interval 0.1"


def start(command):
    # torch 2.5 to 2.15: workers that share torchrun's store find the addresses of their dead predecessors in it
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.DEVNULL, env=env)


def workers(agent):
    """The processes that torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def losses(folder):
    """Step -> training loss, as far as the log has been written."""
    log = Path(folder, "log.jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def last_step(folder):
    return max(losses(folder), default=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="fsdp")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as tmp:
        assert start(f"{VQ} --steps 50 --out {tmp}/vq").wait() == 0
        command = f"{PRIOR} --strategy {args.strategy} --vq {tmp}/vq --cache {tmp}/cache"
        assert start(f"{TORCHRUN} {command} --out {tmp}/whole").wait() == 0
        begin, kills = time.time(), []
        agent = start(f"{TORCHRUN} --max_restarts {args.kills} {command} --out {tmp}/killed")
        for k in range(args.kills):  # spread over the run, and over what a step does
            due = 400 * (k + rng.random()) / (args.kills + 1)
            while last_step(f"{tmp}/killed") < due:
                assert agent.poll() is None, "torchrun gave up"
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.3))
            victim = rng.randrange(4)
            os.kill(workers(agent)[victim], signal.SIGKILL)
            kills.append((last_step(f"{tmp}/killed"), victim))
            time.sleep(1)
        assert agent.wait() == 0
        whole, killed = (load_file(f"{tmp}/{run}/model.safetensors") for run in ("whole", "killed"))
        worst = max(float((whole[k].float() - killed[k].float()).abs().max()) for k in whole)
        a, b = losses(f"{tmp}/whole"), losses(f"{tmp}/killed")
        assert a.keys() == b.keys()
        print(
            f"{args.strategy}: {len(kills)} kills at (step, worker) {kills}; ended by itself after {time.time() - begin:.0f} s; "
            f"largest difference in a loss {max(abs(a[s] - b[s]) for s in a):.1e}, in a weight {worst:.1e}"
        )
        assert worst < 1e-5  # replicas: DDP sums in another order in its first step


if __name__ == "__main__":
    main()
