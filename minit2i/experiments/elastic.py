"""Kill one of four workers at random moments: torchrun restarts all of them, they resume and end as an undisturbed run.

python -m minit2i.experiments.elastic --kills 10 --strategy fsdp

Needs a checkout and some minutes; not a test of the suite.
"""

import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from safetensors.torch import load_file

from minit2i.config import pick
from minit2i.experiments.kill9 import PRIOR, VQ, KillConfig, finish, start
from minit2i.flags import add_flags, new_parser
from minit2i.plot import read_log

STEPS = 400
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 4 --monitor_interval 0.1"
# torch 2.5 to 2.15: workers that share torchrun's store find the addresses of their dead predecessors in it
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class ElasticConfig(KillConfig):
    """How to disturb."""

    strategy: Annotated[str, "replicas or shards", ("ddp", "fsdp")] = "fsdp"


def workers(agent):
    """Process ids of the workers that torchrun started (Linux)."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def losses(folder):
    """{step: training loss} of what the log holds so far."""
    path = Path(folder, "log.jsonl")
    return {r["step"]: r["loss"] for r in (read_log(path) if path.exists() else ()) if "loss" in r}


def disturb(agent, folder, cfg, rng):
    """Kill random workers at random moments spread over the run -> [(last logged step, worker)]."""
    kills = []
    for k in range(cfg.kills):
        due = STEPS * (k + rng.random()) / (cfg.kills + 1)
        while max(losses(folder), default=0) < due:
            if agent.poll() is not None:
                raise RuntimeError("torchrun gave up")
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.randrange(4)
        os.kill(workers(agent)[victim], signal.SIGKILL)
        kills.append((max(losses(folder), default=0), victim))
        time.sleep(1)
    return kills


def main():
    parser = new_parser(__doc__)
    add_flags(parser, ElasticConfig)
    cfg = pick(ElasticConfig, parser.parse_args())
    with tempfile.TemporaryDirectory() as tmp:
        finish(f"{VQ.replace('--steps 500', '--steps 50')} --out {tmp}/vq")
        command = f"{PRIOR} --steps {STEPS} --eval_every 5 --log_every 5 --resume --strategy {cfg.strategy}"
        command += f" --vq {tmp}/vq --cache {tmp}/cache --out {tmp}"
        finish(f"{TORCHRUN} {command}/whole", OWN_STORE)
        begin = time.time()
        agent = start(f"{TORCHRUN} --max_restarts {cfg.kills} {command}/killed", OWN_STORE, stderr=None)
        kills = disturb(agent, f"{tmp}/killed", cfg, random.Random(cfg.seed))
        if agent.wait():
            raise RuntimeError("torchrun ended with an error, printed above")
        whole, killed = (load_file(f"{tmp}/{run}/model.safetensors") for run in ("whole", "killed"))
        worst = max(float((whole[k].float() - killed[k].float()).abs().max()) for k in whole)
        a, b = losses(f"{tmp}/whole"), losses(f"{tmp}/killed")
        assert a.keys() == b.keys()
        print(
            f"{cfg.strategy}: {len(kills)} kills at (step, worker) {kills}; ended after {time.time() - begin:.0f} s; "
            f"largest difference in a loss {max(abs(a[s] - b[s]) for s in a):.1e}, in a weight {worst:.1e}"
        )
        assert worst < 1e-5  # replicas: DDP sums in another order in its first step


if __name__ == "__main__":
    main()
