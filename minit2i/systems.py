"""The six systems of the papers on the same data, steps and parameters, in one table.

    python -m minit2i.systems --data scenes --out out/systems --vq "--steps 600 --perceptual 0 --gan_start 400" --prior "--steps 2000"
    python -m minit2i.systems --data emoji/train --compose emoji/compose --out out/emoji-systems ...

Every recipe (recipes.py) is trained with its paper's choices; only widths change, to what brings tokenizer and prior within
10 % of --vq_params and --prior_params.  --vq and --prior hold further flags of train_vq.py and train_prior.py, for all.
A row is the folder OUT/RECIPE: vq, prior, pictures.png and row.json (figures, settings, model hash, flags).  A finished row
is not run again, a stopped one goes on; table.md, curves.png and pictures.png are drawn from the rows there are.

Not as published: muse without --text_encoder learns its text embedding, lm starts at random (a language model would bring
its own width), and parti's text encoder is not pre-trained.  The validation loss of muse is of hidden codes and compares with no other.
"""

import json
import shlex
import statistics
from dataclasses import asdict, replace
from itertools import islice
from math import log
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from minit2i.checkpoint import read_config, write_file
from minit2i.compare import train
from minit2i.data import DataConfig, captions, grid_image, parse_size, split
from minit2i.flags import add_flags, count, new_parser, pick
from minit2i.gpt import GPT, GPTConfig
from minit2i.metrics import recall, scene_accuracy, seconds_a_picture
from minit2i.plot import plot, smooth
from minit2i.recipes import RECIPES, defaults
from minit2i.sample import Painter, SampleConfig, file_hash
from minit2i.train import n_params, pick_device, read_log, run, save_image
from minit2i.vq import VQ, VQConfig

N_HEAD = 4  # of all priors, so that widths may be multiples of 8


# --- the same number of parameters -------------------------------------------------------------------


def fit(build, rows, target):
    """Rows of ever larger configs -> the first whose model is within 10 % of `target` parameters; ValueError if none is."""
    near = []
    for row in rows:
        for cfg in row:
            try:
                with torch.device("meta"):
                    near.append(n_params(build(cfg)))
            except ValueError:  # a width that this backbone cannot have
                continue
            if abs(near[-1] / target - 1) <= 0.1:
                return cfg
            if near[-1] > target:
                break
    nearest = min(near, key=lambda n: abs(log(n / target)))
    raise ValueError(f"no width gives {build.__name__} within 10 % of {target} parameters; the nearest has {nearest}")


def asked_for(config, name, flags):
    """A recipe's model config, with what --vq or --prior say of it."""
    parser = new_parser("")
    add_flags(parser, config)
    parser.set_defaults(**defaults(name, (config,)))
    return pick(config, parser.parse_known_args(shlex.split(flags))[0])


def widths(name, args):
    """Recipe -> the flags that give its tokenizer and its prior the wanted numbers of parameters."""
    vq = replace(asked_for(VQConfig, name, args.vq), n_codes=args.n_codes)
    depths = sorted(range(1, 9), key=lambda n: abs(n - vq.n_res))  # the recipe's own, if it can be
    vq = fit(VQ, [[replace(vq, ch=ch, n_res=n) for ch in range(4, 257, 4)] for n in depths], args.vq_params)
    shape = dict(n_head=N_HEAD, n_codes=args.n_codes, n_vocab=args.vocab_size)
    height, width = parse_size(args.size)
    shape |= dict(grid_h=height // vq.stride, grid_w=width // vq.stride)
    gpt = replace(asked_for(GPTConfig, name, args.prior), **shape)
    gpt = fit(GPT, [[replace(gpt, n_embd=n) for n in range(64, 1025, 8)]], args.prior_params)
    return {"ch": vq.ch, "n_res": vq.n_res}, {"n_embd": gpt.n_embd, "n_head": N_HEAD}


# --- a row -------------------------------------------------------------------------------------------


def minutes(folder, work, rate):
    """Time of a training without its evaluations: work over the median of the logged rates."""
    return work / statistics.median(r[rate] for r in read_log(folder / "log.jsonl") if rate in r) / 60


def measure(folder, prompts, args):
    """The trained row in a folder -> its figures {column: value}, settings and model hash; pictures.png is written."""
    painter, cfg = Painter(folder / "prior", pick_device(args.device)), SampleConfig(n=1)
    parts = {part: folder / part for part in ("vq", "prior")}
    said = {part: read_config(parts[part])["train"] for part in parts}
    last = {k: v for part in parts.values() for r in read_log(part / "log.jsonl") for k, v in r.items()}
    figures = {
        "tokenizer, M": n_params(painter.vq) / 1e6,
        "prior, M": n_params(painter.prior) / 1e6,
        "PSNR, dB": last["val_psnr"],
        "codes used, %": 100 * last["code_use"],
        "nats a code": last["val_image_loss"],
    }
    if args.data == "scenes":
        table = scene_accuracy(painter, cfg, args.prompts_per_category, say=lambda line: None)
        figures |= {f"{name}, %": 100 * value for name, value in table["seen"].items()}
        figures["held-out, %"] = 100 * table["held_out"]["overall"]
        figures["tokenizer alone, %"] = 100 * table["tokenizer"]["overall"]
    if args.compose:
        found = recall(painter, cfg, args.compose, [args.data])[0]
        figures |= {"own picture, %": 100 * found["own"], "right concept, %": 100 * found["concept"]}
    pictures = said["vq"]["steps"] * said["vq"]["batch_size"]
    tokens = said["prior"]["steps"] * said["prior"]["batch_size"] * painter.prior.cfg.length
    figures["training tokenizer, min"] = minutes(parts["vq"], pictures, "images_per_s")
    figures["training prior, min"] = minutes(parts["prior"], tokens, "tokens_per_s")
    figures["seconds a picture"] = seconds_a_picture(painter, prompts[0], cfg)
    images = torch.cat([images for _, images in painter.paint(prompts, cfg)])
    save_image(folder / "pictures.png", grid_image(images.cpu(), len(images)), prompts=json.dumps(prompts))
    return {"figures": figures, "settings": asdict(cfg), "model": painter.hash}


def make_row(name, folder, own, prompts, args):
    """Train and measure a recipe with its own widths, unless row.json says that just this was done; what it says."""
    same = {"data": args.data, "size": args.size, "seed": args.seed, "device": args.device, "recipe": name}
    flags = [
        {**same, "n_codes": args.n_codes, **own[0]},
        {**same, "vocab_size": args.vocab_size, **own[1], "vq": str(folder / "vq")},
    ]
    lines = [
        [*(str(x) for k, v in some.items() for x in (f"--{k}", v)), *shlex.split(more)]
        for some, more in zip(flags, (args.vq, args.prior))
    ]
    asked = {"flags": lines, "compose": args.compose, "prompts_per_category": args.prompts_per_category}
    path = folder / "row.json"
    if path.exists() and (row := json.loads(path.read_text()))["asked"] == asked:
        return row
    for script, part, line in zip(("train_vq.py", "train_prior.py"), ("vq", "prior"), lines):
        train(script, line, folder / part)
    learned, now = (file_hash(folder / part / "model.safetensors") for part in ("prior/vq", "vq"))
    if learned != now:
        raise ValueError(
            f"{folder / 'prior'} goes on with the codes that {folder / 'vq'} had before; use another --out"
        )
    row = measure(folder, prompts, args) | {"asked": asked}
    write_file(path, json.dumps(row, indent=1) + "\n")
    return row


# --- the table ---------------------------------------------------------------------------------------


def report(out, rows):
    """{recipe: row} -> table.md, a row a figure, curves.png and pictures.png; the table."""
    figures = {name: row["figures"] for name, row in rows.items()}
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for key in next(iter(figures.values())):
        lines.append(f"| {key} | " + " | ".join(f"{some[key]:.3g}" for some in figures.values()) + " |")
    table = "\n".join(lines) + "\n"
    write_file(Path(out, "table.md"), table)
    logs = {name: [r for r in read_log(Path(out, name, "prior", "log.jsonl")) if "image_loss" in r] for name in rows}
    curves = {name: smooth([(r["step"], r["image_loss"]) for r in log], 5) for name, log in logs.items()}
    save_image(Path(out, "curves.png"), plot(curves, "image loss in training, nats a code"))
    strips = [Image.open(Path(out, name, "pictures.png")) for name in rows]
    side = 60  # for the names
    sheet = Image.new("RGB", (side + strips[0].width, sum(im.height for im in strips)), "white")
    for k, (name, strip) in enumerate(zip(rows, strips)):
        sheet.paste(strip, (side, k * strip.height))
        ImageDraw.Draw(sheet).text((4, k * strip.height + strip.height // 2 - 6), name, fill="black")
    save_image(Path(out, "pictures.png"), sheet, prompts=strips[0].text["prompts"])
    return table


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, help="folder of the rows, the table, the curves and the pictures")
    add("--data", default="scenes", help="as in both scripts: scenes, a folder or shards [scenes]")
    add("--recipes", default=",".join(RECIPES), help=f"the rows [{','.join(RECIPES)}]")
    add("--size", default="64", help="of the pictures: 64, or HEIGHTxWIDTH [64]")
    add("--n_codes", type=int, default=1024, help="codebook size [1024]")
    add("--vocab_size", type=int, default=512, help="tokens of the text model [512]")
    add("--vq_params", type=int, default=500_000, help="parameters of each tokenizer [500000]")
    add("--prior_params", type=int, default=1_000_000, help="parameters of each prior [1000000]")
    add("--vq", default="", help="further flags of train_vq.py, as one string")
    add("--prior", default="", help="further flags of train_prior.py, as one string")
    add("--compose", default="", help="folder of captioned pictures for the recall (see metrics.py)")
    add("--prompts_per_category", type=count, default=100, help="of scenes, to measure accuracy [100]")
    add("--seed", type=int, default=0, help="seed of everything random [0]")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    names = args.recipes.split(",")
    for name in names:
        defaults(name, ())  # a ValueError if there is none
    if args.compose and not (Path(args.compose).is_dir() and Path(args.data).is_dir()):
        raise ValueError(f"--compose {args.compose} with --data {args.data}: the recall needs two folders of pictures")
    _, (source, indices) = split(DataConfig(data=args.data, size=args.size))
    firsts = (next(captions(source, [i]), None) for i in indices)  # of each picture that has one
    if not (prompts := list(islice(filter(None, firsts), 8))):
        raise ValueError(f"none of the {len(indices)} validation pictures of {args.data} has a caption")
    own = {name: widths(name, args) for name in names}  # all before the first is trained: one may not be possible
    rows = {name: make_row(name, Path(args.out, name), own[name], prompts, args) for name in names}
    print(report(args.out, rows))


if __name__ == "__main__":
    run(main)
