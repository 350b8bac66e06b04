"""Both stages of a paper in a few minutes on two cores: what `python -m minit2i.papers.NAME` runs.

It prints and runs the commands that a reader would type: train_vq.py, train_prior.py and sample.py on generated
scenes, with the paper's recipe at a small size.  Stopped, it goes on where it was.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

CHECKOUT = Path(__file__).parent.parent
DATA = "--data scenes:6000 --image_size 32 --workers 1"
VQ = "--stride 4 --n_codes 256 --batch_size 16 --warmup 30 --eval_every 300 --perceptual none"
PATCHWISE = "--patchwise --ch 32 --n_res 1 --lr 2e-3 --steps 1800"  # a code sees its patch only: soon learned
VQGAN = "--ch 16 --n_res 1 --code_dim 64 --recon l2 --lr 4e-3 --beta1 0.9 --beta2 0.95"
VQGAN += " --gan 0.1 --gan_ramp 100 --gan_ch 16 --gan_layers 2"
PRIOR = "--n_layer 4 --n_head 4 --n_embd 128 --text_len 28 --vocab_size 512"
PRIOR += " --batch_size 16 --optimizer muon --lr 3e-3 --steps 2000 --warmup 50 --eval_every 500"
PROMPTS = (
    "a large red circle",
    "a large green triangle on a black background",
    "two striped cyan squares",
    "a large yellow star above a small blue square",
)


def run(script, flags):
    """Print and run a script of the checkout; exit with its status if it fails."""
    print(f"\n$ python {script} {flags}", flush=True)
    if not (CHECKOUT / script).exists():
        sys.exit(f"error: {CHECKOUT / script} is not there; run this in a checkout of the repository")
    if code := subprocess.run([sys.executable, CHECKOUT / script, *shlex.split(flags)]).returncode:
        sys.exit(code)


def demo(name, doc, expect, vq="", prior="", sample=""):
    """Train both stages of recipe `name` and sample a grid.

    doc: the paper's docstring; expect: what the grid shows; vq, prior, sample: further flags of the three scripts.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=f"out/papers/{name}", help="folder of both runs and the grid")
    parser.add_argument("--steps", type=int, help="steps of both stages, to try whether it runs [the paper's own]")
    args = parser.parse_args()
    steps = f" --steps {args.steps} --eval_every {args.steps}" if args.steps else ""
    game = f" --gan_start {args.steps // 2}" if args.steps and "--gan_start" in vq else ""
    out = Path(args.out)

    def at(name):
        """A path in --out, quoted."""
        return shlex.quote(str(out / name))

    print(doc.partition("\n")[0])
    run("train_vq.py", f"--recipe {name} {DATA} {VQ} {vq}{steps}{game} --out {at('vq')} --resume")
    run(
        "train_prior.py",
        f"--recipe {name} {DATA} {PRIOR} {prior}{steps} --vq {at('vq')} --cache {at('cache')} "
        f"--out {at('prior')} --resume",
    )
    (out / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run("sample.py", f"--model {at('prior')} --prompts {at('prompts.txt')} {sample} --out {at('grid.png')}")
    image = Image.open(out / "grid.png")
    image.resize((4 * image.width, 4 * image.height), Image.NEAREST).save(out / "grid.png")
    print(f"\n{out / 'grid.png'}, four images a row: " + "; ".join(PROMPTS) + f"\nexpect: {expect}")
