"""The six papers' systems on the same data, steps and number of parameters, in one table.

    python -m minit2i.experiments.systems --tokenizer out/vq --prior "--steps 8000 --keep" --out out/priors
    python -m minit2i.experiments.systems --data emoji/train --compose emoji/compose --out out/emoji-systems \\
        --vq "--steps 600" --prior "--steps 2000"

The first compares the priors on one frozen tokenizer, the second whole systems with a tokenizer each.  Every recipe
(papers/*.py) is trained with its paper's choices; only widths change, until prior (and tokenizer) are within 10 % of
--prior_params (and --vq_params).  --vq and --prior hold further flags of train_vq.py and train_prior.py, for all
recipes.  With --keep among them the scenes' accuracy is measured at every evaluation, too.

A row is the folder OUT/RECIPE: vq, prior, images.png and row.json (figures, settings, model hash, flags).  A finished
row is not run again, a stopped one resumes; table.md, curves.png, accuracy.png and images.png are made from the rows
that exist.

Not as published: muse trains its text encoder, lm starts from scratch (a language model would bring
its own width), and parti's text encoder is not pre-trained.  muse's validation loss is of hidden codes only and
compares with no other.
"""

import argparse
import json
import shlex
import statistics
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import log, nan
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image, ImageDraw

from minit2i.checkpoint import file_hash, read_config, write_file
from minit2i.config import Settings, Group, above, at_least, pick
from minit2i.data import DataConfig, captions, parse_size, split
from minit2i.experiments.evaluate import recall, scene_accuracy, seconds_per_image
from minit2i.experiments.tokenizers import run_script
from minit2i.flags import add_flags, named, new_parser
from minit2i.gpt import CONDITIONS, MODELS, GPTConfig, build_prior, reads_captions
from minit2i.papers import RECIPES
from minit2i.plot import grid_image, plot, read_log, save_image, smooth
from minit2i.sample import Pipeline
from minit2i.train import n_params, pick_device, run
from minit2i.vq import BACKBONES, QUANTIZERS, VQConfig, build_vq

N_HEAD = 4  # of every prior, so that widths can be multiples of 8


@dataclass(frozen=True)
class SystemsConfig(Settings):
    """What to compare."""

    group = Group("Comparison")
    out: Annotated[str, "folder of the rows, the table, the curves and the images"]
    data: Annotated[str, "as in both scripts: scenes, a folder or shards"] = "scenes"
    recipes: Annotated[str, "the rows"] = ",".join(RECIPES)
    tokenizer: Annotated[str, "folder of one frozen tokenizer for all rows; empty: each recipe trains its own"] = ""
    masked_times: Annotated[int, "masked priors get this many times the steps", at_least(1)] = 1
    image_size: Annotated[str, "64, or HEIGHTxWIDTH"] = "64"
    n_codes: Annotated[int, "codebook size", at_least(1)] = 1024
    vocab_size: Annotated[int, "tokens of the text model", at_least(1)] = 512
    vq_params: Annotated[int, "parameters of each tokenizer", above(0)] = 500_000
    prior_params: Annotated[int, "parameters of each prior", above(0)] = 1_000_000
    vq: Annotated[str, "further flags of train_vq.py, as one string"] = ""
    prior: Annotated[str, "further flags of train_prior.py, as one string"] = ""
    compose: Annotated[str, "folder of captioned images for the recall (see evaluate.py)"] = ""
    prompts_per_category: Annotated[int, "scenes per category, to measure accuracy", at_least(1)] = 100
    seed: Annotated[int, "seed of everything random"] = 0
    device: Annotated[str, "auto, cpu, cuda, mps"] = "auto"


# --- the same number of parameters -------------------------------------------------------------------


def fit_width(build, rows, target):
    """Rows of ever larger settings -> the first with a model within 10 % of `target` parameters; else ValueError."""
    near, why = [], ""
    for row in rows:
        for settings in row:
            try:
                with torch.device("meta"):
                    near.append(n_params(build(settings)))
            except ValueError as e:  # a width that this backbone cannot have, or other settings that cannot work
                why = e
                continue
            if abs(near[-1] / target - 1) <= 0.1:
                return settings
            if near[-1] > target:
                break
    if not near:
        raise ValueError(f"no width works: {why}")
    nearest = min(near, key=lambda n: abs(log(n / target)))
    raise ValueError(f"no width gives {build.__name__} within 10 % of {target} parameters; the nearest has {nearest}")


def model_settings(recipe, flags, config, *registries):
    """A recipe's settings of the model, updated by those flags of --vq or --prior that concern the model."""
    parser = new_parser("", argument_default=argparse.SUPPRESS, add_help=False)
    parts = [getattr(part, "Config", None) for registry in registries for part in registry.values()]
    add_flags(parser, config, *filter(None, dict.fromkeys(parts)))
    return asdict(config()) | recipe | vars(parser.parse_known_args(shlex.split(flags))[0])


def widths(name, cfg):
    """Recipe -> the flags that give its tokenizer and its prior the wanted numbers of parameters."""
    if cfg.tokenizer:
        vq, own = read_config(cfg.tokenizer)["model"], {}
    else:
        vq = model_settings(RECIPES[name]["vq"], cfg.vq, VQConfig, QUANTIZERS, BACKBONES) | {"n_codes": cfg.n_codes}
        depths = sorted(range(1, 9), key=lambda n: abs(n - vq["n_res"]))  # the recipe's own first
        rows = [[vq | {"ch": ch, "n_res": n} for ch in range(4, 257, 4)] for n in depths]
        vq = fit_width(build_vq, rows, cfg.vq_params)
        own = {"ch": vq["ch"], "n_res": vq["n_res"]}
    height, width = parse_size(cfg.image_size)
    shape = dict(n_head=N_HEAD, n_codes=vq["n_codes"], grid_h=height // vq["stride"], grid_w=width // vq["stride"])
    prior = model_settings(RECIPES[name]["prior"], cfg.prior, GPTConfig, MODELS, CONDITIONS) | shape
    words = {} if reads_captions(pick(GPTConfig, prior)) else {"vocab_size": cfg.vocab_size}
    prior["n_vocab"] = words.get("vocab_size", 0)
    prior = fit_width(build_prior, [[prior | {"n_embd": n} for n in range(64, 1025, 8)]], cfg.prior_params)
    return own, {"n_embd": prior["n_embd"], "n_head": N_HEAD} | words


# --- a row -------------------------------------------------------------------------------------------


def minutes(folder, work, rate):
    """Time of a training without its evaluations: work over the median of the logged rates; NaN if none is logged."""
    rates = [r[rate] for r in read_log(folder / "log.jsonl") if rate in r]
    return work / statistics.median(rates or [nan]) / 60


def learning(folder, cfg):
    """Kept checkpoints of a prior -> [(images seen, the oracle's accuracy on seen scenes in %)], see --keep."""
    size, points = read_config(folder)["train"]["batch_size"], []
    for kept in sorted(folder.glob("step-*")):
        pipe = Pipeline(kept, pick_device(cfg.device))
        table = scene_accuracy(pipe, pipe.sampling, cfg.prompts_per_category, splits=("seen",), say=lambda line: None)
        points.append((int(kept.name.removeprefix("step-")) * size, 100 * table["seen"]["overall"]))
    return points


def quality_figures(pipe, points, cfg):
    """What the images of a trained row are worth -> {column: value}; points: see `learning`."""
    figures, sampling = {}, replace(pipe.sampling, n=1)
    if cfg.data.startswith("scenes"):
        table = scene_accuracy(pipe, sampling, cfg.prompts_per_category, say=lambda line: None)
        figures |= {f"{name}, %": 100 * value for name, value in table["seen"].items()}
        figures["held-out, %"] = 100 * table["held_out"]["overall"]
        figures["tokenizer alone, %"] = 100 * table["tokenizer"]["overall"]
    for share in (50, 80) if points else ():
        figures[f"images to {share} %"] = next((n for n, accuracy in points if accuracy >= share), nan)
    if cfg.compose:
        found = recall(pipe, sampling, cfg.compose, [cfg.data])[0]
        figures |= {"own image, %": 100 * found["own"], "right concept, %": 100 * found["concept"]}
    return figures


def measure(folder, prompts, cfg):
    """The trained row in a folder -> figures {column: value}, settings, model hash, `learning`; writes images.png."""
    pipe, parts = Pipeline(folder / "prior", pick_device(cfg.device)), {k: folder / k for k in ("vq", "prior")}
    parts = {k: part for k, part in parts.items() if part.exists()}  # without vq if all rows share one
    sampling, said = replace(pipe.sampling, n=1), {part: read_config(parts[part])["train"] for part in parts}
    last = {k: v for part in parts.values() for r in read_log(part / "log.jsonl") for k, v in r.items()}
    figures = {"tokenizer, M": n_params(pipe.vq) / 1e6, "prior, M": n_params(pipe.model) / 1e6}
    if "vq" in parts:
        figures |= {"PSNR, dB": last["val_psnr"], "codes used, %": 100 * last["code_use"]}
        n_images = said["vq"]["steps"] * said["vq"]["batch_size"]
        figures["training tokenizer, min"] = minutes(parts["vq"], n_images, "images_per_s")
    points = learning(parts["prior"], cfg) if cfg.data.startswith("scenes") else []
    figures |= {"nats/code": last["val_image_loss"]} | quality_figures(pipe, points, cfg)
    n_images = said["prior"]["steps"] * said["prior"]["batch_size"]
    figures["images seen"] = n_images
    figures["training prior, min"] = minutes(parts["prior"], n_images * pipe.model.layout.length, "tokens_per_s")
    figures["seconds/image"] = seconds_per_image(pipe, prompts[0], sampling)
    figures["seconds/image, 16 at once"] = seconds_per_image(pipe, prompts[0], replace(sampling, n=16)) / 16
    images = torch.cat([images for _, images in pipe(prompts, sampling)])
    save_image(folder / "images.png", grid_image(images.cpu(), len(images)), prompts=json.dumps(prompts))
    return {"figures": figures, "settings": asdict(sampling), "model": pipe.hash, "learning": points}


def more_steps(line, times):
    """A command line with --steps this many times larger."""
    at = line.index("--steps") + 1
    return [*line[:at], str(times * int(line[at])), *line[at + 1 :]]


def make_row(name, folder, own, prompts, cfg):
    """Train and measure a recipe with its own widths -> row.json, which is only read if its flags are the same."""
    same = {"data": cfg.data, "image_size": cfg.image_size, "seed": cfg.seed, "device": cfg.device, "recipe": name}
    vq = Path(cfg.tokenizer) if cfg.tokenizer else folder / "vq"
    flags = [{**same, "n_codes": cfg.n_codes, **own[0]}, {**same, **own[1], "vq": str(vq)}]
    lines = [
        [*(str(x) for k, v in some.items() for x in (f"--{k}", v)), *shlex.split(more)]
        for some, more in zip(flags, (cfg.vq, cfg.prior))
    ]
    if cfg.masked_times > 1 and RECIPES[name]["prior"].get("model") == "masked":
        lines[1] = more_steps(lines[1], cfg.masked_times)
    lines = [None, lines[1]] if cfg.tokenizer else lines
    asked = {"flags": lines, "compose": cfg.compose, "prompts_per_category": cfg.prompts_per_category}
    path = folder / "row.json"
    if path.exists() and (row := json.loads(path.read_text()))["asked"] == asked:
        return row
    for script, part, line in zip(("train_vq.py", "train_prior.py"), ("vq", "prior"), lines):
        if line:
            run_script(script, line, folder / part)
    learned, now = file_hash(folder / "prior" / "vq" / "model.safetensors"), file_hash(vq / "model.safetensors")
    if learned != now:
        raise ValueError(f"{folder / 'prior'} was trained on earlier codes of {vq}; use another --out")
    row = measure(folder, prompts, cfg) | {"asked": asked}
    write_file(path, json.dumps(row, indent=1) + "\n")
    return row


# --- the table ---------------------------------------------------------------------------------------


def report(out, rows):
    """{recipe: row} -> the table, a line per figure; writes table.md, curves.png, accuracy.png and images.png."""
    figures = {name: row["figures"] for name, row in rows.items()}
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for key in next(iter(figures.values())):
        lines.append(f"| {key} | " + " | ".join(f"{some[key]:.3g}" for some in figures.values()) + " |")
    table = "\n".join(lines) + "\n"
    write_file(Path(out, "table.md"), table)
    logs = {name: [r for r in read_log(Path(out, name, "prior", "log.jsonl")) if "image_loss" in r] for name in rows}
    curves = {name: smooth([(r["step"], r["image_loss"]) for r in log], 5) for name, log in logs.items()}
    save_image(Path(out, "curves.png"), plot(curves, "image loss in training, nats/code"))
    if points := {name: row["learning"] for name, row in rows.items() if row["learning"]}:
        save_image(Path(out, "accuracy.png"), plot(points, "seen scenes right, %", unit="images"))
    strips = [Image.open(Path(out, name, "images.png")) for name in rows]
    side = 60  # for the names
    grid = Image.new("RGB", (side + strips[0].width, sum(im.height for im in strips)), "white")
    for k, (name, strip) in enumerate(zip(rows, strips)):
        grid.paste(strip, (side, k * strip.height))
        ImageDraw.Draw(grid).text((4, k * strip.height + strip.height // 2 - 6), name, fill="black")
    save_image(Path(out, "images.png"), grid, prompts=strips[0].text["prompts"])
    return table


def main():
    parser = new_parser(__doc__)
    add_flags(parser, SystemsConfig)
    cfg = pick(SystemsConfig, parser.parse_args())
    names = cfg.recipes.split(",")
    for name in names:
        named("recipe", name, RECIPES)  # ValueError for an unknown one
    if cfg.compose and not (Path(cfg.compose).is_dir() and Path(cfg.data).is_dir()):
        raise ValueError(f"--compose {cfg.compose} with --data {cfg.data}: the recall needs two folders of images")
    _, (source, indices) = split(DataConfig(data=cfg.data, image_size=cfg.image_size))
    firsts = (next(captions(source, [i]), None) for i in indices)  # of each image that has a caption
    if not (prompts := list(islice(filter(None, firsts), 8))):
        raise ValueError(f"none of the {len(indices)} validation images of {cfg.data} has a caption")
    if cfg.masked_times > 1 and "--steps" not in shlex.split(cfg.prior):
        raise ValueError('--masked_times multiplies --steps; name them in --prior, as --prior "--steps 8000"')
    own = {name: widths(name, cfg) for name in names}  # before any training: one may be impossible
    rows = {name: make_row(name, Path(cfg.out, name), own[name], prompts, cfg) for name in names}
    print(report(cfg.out, rows))


if __name__ == "__main__":
    run(main)
