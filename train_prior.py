"""Stage 2: train a prior on captions and the codes of a frozen tokenizer.

    python train_prior.py --data path/to/images --vq out/vq --out out/prior
    python train_prior.py --recipe muse --data path/to/images --vq out/vq --out out/muse
    torchrun --nproc_per_node 8 train_prior.py --data 'shards/{00000..00041}.tar' --vq out/vq --out out/prior \\
        --batch_size 512 --model_size base

--model says how it learns and samples, --condition what it is conditioned on; give them with --help for their own
flags.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Annotated, Any

import torch

from minit2i.checkpoint import file_hash, keep_copy, load_model, load_vq, read_config, write_file
from minit2i.collectives import barrier
from minit2i.config import RARE, Group, above, at_least, between, merge, pick
from minit2i.data import DataConfig, Skipped, captions, none_usable, parse_size, split, step_batches, without_captions
from minit2i.flags import changed_settings, describe, parse_flags
from minit2i.fp16 import make_scaler
from minit2i.gpt import CONDITIONS, MODELS, GPTConfig, View, conditions_of, grow_vocabulary, prior_config, views_of
from minit2i.gpt import reads_captions, with_codes
from minit2i.papers import RECIPES, SIZES
from minit2i.parallel import parallelize, sync_gradients, unsharded
from minit2i.plot import captioned_grid
from minit2i.resume import Learner, load_state, save_run
from minit2i.sample import SampleConfig, Sampler
from minit2i.tokens import Coded, Crops, Text, code_cache, collate, new_vocabulary
from minit2i.train import DTYPES, EMA, EVAL_SIZE, Log, Processes, TrainConfig
from minit2i.train import check_finite, check_loss, make_optimizer, n_params, optimizer_step, resumed_schedule, run
from minit2i.train import seed_step, steps
from minit2i.vq import build_vq
from minit2i.vqmodel import copy_tokenizer, tokenizer_config


@dataclass(frozen=True)
class PriorTrainConfig(TrainConfig):
    """How to train the prior."""

    vq: Annotated[str, "the tokenizer's folder, or one that diffusers wrote (--vq_range); the run keeps a copy"] = (
        "out/vq"
    )
    vq_range: Annotated[
        str, "range of its pixels, 0,1 or -1,1, if diffusers wrote that folder", Group("Data"), RARE
    ] = ""
    cache: Annotated[str, "folder for the images' codes, which later runs find", Group("Data")] = "out/cache"
    crops: Annotated[int, "crops of each image; 1: the central one", Group("Data"), at_least(1)] = 1
    code_samples: Annotated[
        int, "random codes of each crop, one for each epoch (DALL-E); 0: the most likely code", Group("Data"),
        at_least(0), RARE,
    ] = 0  # fmt: skip
    code_temperature: Annotated[
        float, "temperature of the random codes' logits; the log says in how many codes two grids differ",
        Group("Data"), above(0), RARE,
    ] = 1.0  # fmt: skip
    vocab_size: Annotated[
        int, "tokens of the text model, which the first run trains", Group("Data"), between(1, 10**6)
    ] = 2048  # fmt: skip
    grow_vocab: Annotated[bool, "extend --init's text model by new words, to --vocab_size", Group("Data"), RARE] = False
    bpe_dropout: Annotated[float, "probability to skip a merge of the text model", Group("Data"), between(0, 1)] = 0.1
    cond_drop: Annotated[float, "probability to drop the caption, for guidance", Group("Data"), between(0, 1)] = 0.1
    model_size: Annotated[str, f"a named size ({', '.join(SIZES)}); the model's flags win over it", Group("Model")] = ""
    text_weight: Annotated[
        float, "weight of the mean text loss; the image's is 1 minus it", Group("Loss"), between(0, 1)
    ] = 1 / 8
    loss_mean: Annotated[
        str, "kinds: one mean for text and one for codes; tokens: one for all, without --text_weight (CogView)",
        Group("Loss"), ("kinds", "tokens"),
    ] = "kinds"  # fmt: skip
    steps: Annotated[int, "optimizer steps", at_least(0)] = 10000
    lr: Annotated[float, "peak learning rate"] = 1e-3
    weight_decay: Annotated[float, "decoupled weight decay of matrices", at_least(0)] = 0.045
    beta1: float = 0.9  # plain fields: no flags here
    min_lr: float = 0.05
    ema: Annotated[float, "decay of the averaged weights, which are what is saved; 0: none", between(0, 1)] = 0.999
    optimizer: Annotated[str, "muon: Muon for the matrices of blocks, AdamW for the rest", ("adamw", "muon")] = "adamw"
    strategy: Annotated[
        str, "replicas, shards (FSDP2), or shards within a node and replicas between nodes", Group("Scale"),
        ("ddp", "fsdp", "hsdp"),
    ] = "ddp"  # fmt: skip
    powersgd: Annotated[int, "rank of compressed gradients between replicas; 0: off", Group("Scale"), at_least(0)] = 0
    checkpoint_activations: Annotated[bool, "recompute blocks in the backward pass: less memory", Group("Scale")] = (
        False
    )
    keep: Annotated[bool, "keep the checkpoint of each evaluation, in OUT/step-N", Group("Run"), RARE] = False
    block_scale: Annotated[bool, "a gradient scale for each residual branch (DALL-E)", Group("Half precision")] = False


# --- data ----------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run learns from, and the samples that its grids show."""

    text: Any  # tokens.Text, or what a condition reads captions with
    train_set: torch.utils.data.Dataset
    val_set: torch.utils.data.Dataset
    vq: torch.nn.Module | None = None
    grid: tuple = (0, 0)
    shown: dict = field(default_factory=dict)  # heading -> [(sample, caption)]
    skipped: Skipped | str = "no images"


def text_model(model, model_cfg, cfg, source, indices):
    """The SentencePiece model (bytes) of a new run; None if a condition reads captions itself.  ValueError if there are
    no captions."""
    if reads_captions(model_cfg):
        return None
    some = captions(source, indices[:: -(-len(indices) // 50_000)])  # at most 50,000 entries, evenly spaced
    if (first := next(some, None)) is None:
        raise none_usable(indices, without_captions(source, indices[:3]))
    return new_vocabulary(cfg, model.vocabulary(model_cfg), chain([first], some))


def keep_inputs(model_cfg, cfg, words):
    """Write a new run's text model (bytes or None), and copy its conditions' tokenizers into its folder."""
    for view in views_of(model_cfg):
        if view.vq:
            copy_tokenizer(view.vq, Path(cfg.out, f"{view.key}_vq"))
    if words:
        write_file(Path(cfg.out, "text.model"), words)


def read_captions(model_cfg, cfg, sets, procs):
    """The reader of captions: a condition's (a frozen text encoder, which reads them all now), or the text model."""
    for condition in conditions_of(model_cfg):
        if condition.reads_captions:
            text = condition.reader(model_cfg, procs.device, DTYPES[procs.precision])
            text.remember([line for some in sets for line in captions(*some)], cfg.cache, procs)
            return text
    return Text(Path(cfg.out, "text.model").read_bytes(), model_cfg.text_len)


def trained_as(folder):
    """The class of a prior's checkpoint."""
    return MODELS[read_config(folder)["model"]["model"]]


def load_views(model_cfg, cfg, vq, device):
    """What the caches are to hold -> {key: (View, its tokenizer)}: the prior's own codes and those that its conditions
    read.  ValueError if --init has learned those of another tokenizer."""
    views = {"codes": (View("codes", lambda images: images, ""), vq)}
    for view in views_of(model_cfg):
        other = vq
        if view.vq:
            other = load_vq(Path(cfg.out, f"{view.key}_vq") if cfg.resume else view.vq, device)
            if other.hash != view.vq_hash:
                raise ValueError(
                    f"{cfg.init} learned the {view.key} codes of another tokenizer than {view.vq}; "
                    f"use --{view.key}_vq {Path(cfg.init, f'{view.key}_vq')}"
                )
        views[view.key] = view, other
    return views


def load_images(model, model_cfg, data_cfg, cfg, procs):
    """Captions -> text model, images -> codes, once.  ValueError if --init has learned the codes of another
    tokenizer."""
    sets = (source, train), (val_source, val) = split(data_cfg)
    if procs.main and not cfg.resume:
        words = text_model(model, model_cfg, cfg, source, train)  # before anything is written: it may be impossible
        copy_tokenizer(cfg.vq, Path(cfg.out, "vq"), cfg.vq_range, data_cfg.image_size)
    barrier()
    vq = load_vq(Path(cfg.out, "vq"), procs.device)
    if cfg.init and not cfg.resume and not trained_as(cfg.init).data:  # what learned from text alone has no tokenizer
        if file_hash(own := Path(cfg.init, "vq", "model.safetensors")) != vq.hash:
            raise ValueError(f"{cfg.init} learned the codes of another tokenizer than {cfg.vq}; use --vq {own.parent}")
    grid = vq.grid(*parse_size(data_cfg.image_size))
    model_cfg = with_codes(model_cfg, vq, grid)  # what does not fit is refused before anything is encoded
    views = load_views(model_cfg, cfg, vq, procs.device)
    if procs.main and not cfg.resume:
        keep_inputs(model_cfg, cfg, words)
    barrier()
    text = read_captions(model_cfg, cfg, sets, procs)
    sampled = dict(samples=cfg.code_samples, temperature=cfg.code_temperature)
    crops = Crops(source, train, data_cfg, cfg.crops, cfg.seed, **sampled)
    val_crops = Crops(val_source, val, data_cfg)

    def caches(crops):
        return {key: code_cache(cfg.cache, crops, own, procs, view.f, view.name) for key, (view, own) in views.items()}

    train_caches, val_caches = caches(crops), caches(val_crops)
    skipped = Skipped(procs.say)
    skipped.add([*source.skipped, *val_source.skipped, *train_caches["codes"].skipped, *val_caches["codes"].skipped])
    if not val_caches["codes"].ok.any():  # a few images, and the one kept for validation is unusable
        val_source, val, val_caches = source, train, train_caches
    procs.say(str(skipped))
    cond_drop = cfg.cond_drop if model.drops_captions else 0.0
    train_set = Coded(source, train, train_caches, text, cfg.seed, cfg.bpe_dropout, cond_drop)
    if cfg.code_samples > 1:
        share = train_caches["codes"].differing()
        procs.say(f"{cfg.code_samples} random grids for each crop; two of them differ in {share:.0%} of their codes")
    val_set = Coded(val_source, val, val_caches, text)
    seen = Coded(source, train, train_caches, text)  # training samples without dropout, for the grids
    shown = {
        title: [(some[i], some.captions(some.rows[i])[0]) for i in range(0, len(some), -(-len(some) // 4))]
        for title, some in (("training", seen), ("validation", val_set))
    }
    return Data(text, train_set, val_set, vq, grid, shown, skipped)


# --- the model -----------------------------------------------------------------------------------------


def settle(model_cfg, data_cfg, cfg):
    """Fill in dependent fields -> (the model's class, and the configs); ValueError for settings that conflict."""
    model, model_cfg = prior_config(asdict(model_cfg))
    if data_cfg.crop != "any" and cfg.crops == 1:
        raise ValueError(f"crop {data_cfg.crop} places random crops, and --crops 1 is the central one; use --crops 4")
    if not data_cfg.image_size and not model.data:
        folder = Path(cfg.out, "vq") if cfg.resume else cfg.init or cfg.vq
        saved = read_config(folder) if cfg.resume or cfg.init else tokenizer_config(folder, cfg.vq_range)
        if not saved["data"].get("image_size"):
            raise ValueError(f"{folder} does not say the size of its images; give --image_size")
        data_cfg = replace(data_cfg, image_size=saved["data"]["image_size"])
    check_vocabulary(model_cfg, cfg)
    if cfg.resume:
        before = read_config(cfg.out)["train"]
        for name in ("block_scale", "optimizer"):
            if getattr(cfg, name) != before[name]:
                raise ValueError(f"--resume cannot change --{name}: its state in {cfg.out} would be lost; use --init")
    return model, model_cfg, data_cfg, cfg


def check_vocabulary(model_cfg, cfg):
    """ValueError if --vocab_size or --grow_vocab would do nothing."""
    asked = cfg.vocab_size not in (
        PriorTrainConfig.vocab_size,
        cfg.init and read_config(cfg.init)["train"].get("vocab_size"),
    )
    if cfg.grow_vocab and not cfg.init:
        raise ValueError("--grow_vocab extends the text model of another run: it needs --init")
    if cfg.grow_vocab and reads_captions(model_cfg):
        raise ValueError(f"--grow_vocab: --condition {model_cfg.condition} reads captions with a vocabulary of its own")
    if asked and not (cfg.init or cfg.resume) and reads_captions(model_cfg):
        raise ValueError(
            f"--vocab_size {cfg.vocab_size}: --condition {model_cfg.condition} reads captions with a vocabulary of its "
            "own; leave it out"
        )
    if asked and cfg.init and not (cfg.grow_vocab or cfg.resume):
        raise ValueError(
            f"--vocab_size {cfg.vocab_size}: the text model is that of --init {cfg.init}; leave it out, or add "
            "--grow_vocab, which extends it"
        )


def make_model(model, model_cfg, cfg, data):
    """The prior at its start: randomly initialised, from --init, or as its settings say (a language model)."""
    torch.manual_seed(cfg.seed)
    model_cfg = replace(model_cfg, n_vocab=data.text.n_vocab)
    if data.vq:
        model_cfg = with_codes(model_cfg, data.vq, data.grid)
    if cfg.resume and changed_settings(model_cfg, pick(type(model_cfg), read_config(cfg.out)["model"])):
        raise ValueError(f"--resume cannot change the code grid or the text of {cfg.out}; use another --out")
    prior = model(model_cfg)
    prior.check(cfg.text_weight)
    if cfg.init and not cfg.resume:
        n_vocab, fit = read_config(cfg.init)["model"]["n_vocab"], trained_as(cfg.init).tensors_for
        spelled = data.text.spelling(n_vocab) if cfg.grow_vocab else []
        load_model(cfg.init, prior, lambda old, prior: fit(grow_vocabulary(old, n_vocab, spelled), prior)).train()
    elif not cfg.resume:
        prior.load_start()
    return prior


def say_sizes(model, model_cfg, data_cfg, cfg):
    """--dry_run: the resolved settings and, if the tokenizer is there, the number of parameters."""
    print(describe((model_cfg, data_cfg, cfg)))
    if not model.data:
        if not Path(cfg.vq, "config.json").exists():
            return print(f"there is no tokenizer in {cfg.vq} yet: its codes decide the prior's size")
        with torch.device("meta"):
            vq = build_vq(tokenizer_config(cfg.vq, cfg.vq_range)["model"])
        model_cfg = with_codes(model_cfg, vq, vq.grid(*parse_size(data_cfg.image_size)))
    n_vocab = 0 if reads_captions(model_cfg) else model_cfg.n_vocab or cfg.vocab_size
    with torch.device("meta"):
        prior = model(replace(model_cfg, n_vocab=n_vocab))
    print(f"{n_params(prior) / 1e6:.2f} M parameters, {prior.layout.n_prefix}+{prior.cfg.n_image} positions")


# --- evaluation and a step -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, val_set, cfg, procs):
    """Means over the first validation samples -> {"val_image_loss": nats per code, ...}."""
    n, size = min(EVAL_SIZE, len(val_set)), model.eval_batch or cfg.batch_size // (cfg.accum * procs.world)
    stop = n - n % size if model.eval_batch and n >= size else n  # towers compare within whole batches
    starts = list(range(0, stop, size))
    sums = {}
    for k in range(procs.rank, -(-len(starts) // procs.world) * procs.world, procs.world):
        first = starts[k] if k < len(starts) else 0  # a sharded model needs all processes in every pass
        rows = range(first, min(first + size, n))
        batch = model.corrupt(collate([val_set[i] for i in rows]), rows)
        with procs.autocast():
            found = model.evaluate(to_device(batch, procs.device))
        for name, (total, count) in found.items():
            sum_, n_terms = sums.get(name, (0.0, 0))
            sums[name] = (sum_ + float(total), n_terms + int(count)) if k < len(starts) else (sum_, n_terms)
    totals = procs.sum([x for pair in sums.values() for x in pair])
    return {f"val_{name}": totals[2 * i] / max(1, totals[2 * i + 1]) for i, name in enumerate(sums)}


def draw_samples(model, data, cfg, device):
    """Samples for the shown captions, a column each -> grid, captions; (None, None) if the model shows nothing."""
    samples, given = zip(*(pair for pairs in data.shown.values() for pair in pairs))
    batch = to_device(collate(samples), device)
    batch.pop("n_cut")
    settings, n = merge(SampleConfig, model.Sampling)(seed=cfg.seed), model.n_shown * len(given)
    sampler = Sampler(settings, range(cfg.seed, cfg.seed + n), device)
    with torch.compiler.set_stance("force_eager"):  # blocks may be compiled, and each code would be another shape
        found = model.sample(batch, data.text.encode("").to(device), sampler, data.text)
    if found is None:
        return None, None
    codes, written = found
    images = data.vq.decode(codes.view(-1, *data.grid)).unflatten(0, (len(given), -1))  # (columns, rows, 3, H, W)
    starts = [0, *accumulate(map(len, data.shown.values()))][:-1]
    return captioned_grid(images.transpose(0, 1), written or given, tuple(data.shown), starts), written or given


def log_evaluation(model, data, log, step, cfg, procs):
    """Write validation losses and a grid of samples to the log and its folder."""
    values, grid, shown = evaluate(model, data.val_set, cfg, procs), None, None
    check_finite(model, procs, step, values)
    whole = unsharded(model, procs)
    if procs.main and data.shown and whole is not None:
        grid, shown = draw_samples(whole, data, cfg, procs.device)
    log.evaluation(step, values, ["image_loss", "text_loss", "grad_norm"], grid, prompts=json.dumps(shown))
    barrier()
    procs.say(f"\nstep {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def to_device(batch, device):
    """A batch's tensors on a device; other entries unchanged."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def corrupt(model, parts, step, cfg, procs):
    """Micro-batches with what the model hides from itself, seeded by each sample's place in the run, on the device."""
    size = len(parts[0]["text"])
    first = cfg.seed * 1_000_003 + step * cfg.batch_size + procs.rank * cfg.accum * size
    seeds = [range(first + k * size, first + (k + 1) * size) for k in range(len(parts))]
    return [to_device(model.corrupt(part, some), procs.device) for part, some in zip(parts, seeds)]


def loss_weights(totals, cfg):
    """{loss: number of terms in the whole batch} -> {loss: its weight}; they sum to 1."""
    if cfg.loss_mean == "tokens" or len(totals) == 1:
        return {name: n / sum(totals.values()) for name, n in totals.items()}
    return {"text": cfg.text_weight, "image": 1 - cfg.text_weight}


def gradients(forward, model, parts, cfg, procs, scaler):
    """Backward passes over the micro-batches -> this process's shares of {"text_loss": mean, "image_loss": mean,
    "loss": ()}."""
    counts = [model.n_targets(part) for part in parts]
    names = sorted(counts[0], reverse=True)  # text, image
    totals = [sum(torch.as_tensor(c[name]).float().to(procs.device) for c in counts) for name in names]
    totals = dict(zip(names, procs.all_reduce(torch.stack(totals)).clamp_min(1)))
    weights, means = loss_weights(totals, cfg), dict.fromkeys([*(f"{name}_loss" for name in names), "loss"], 0.0)
    for k, part in enumerate(parts):
        sync_gradients(forward, k == cfg.accum - 1)
        with procs.autocast():
            losses = forward(part, train=True)
        loss = sum(weights[name] * losses[name] / totals[name] for name in names)
        scaler.scale(loss * procs.world).backward()  # x world: DDP and FSDP average, and these are shares of a sum
        found = {f"{name}_loss": losses[name] / totals[name] for name in names} | {"loss": loss}
        means = {name: means[name] + value.detach() for name, value in found.items()}
    return means


def log_step(log, step, means, norm, learner, cfg, procs):
    """Write a training step's losses, summed over the processes' shares, to the log."""
    values = dict(zip(means, procs.sum([float(v) for v in means.values()])))
    check_loss(values["loss"], learner.module, procs, step)
    values |= {"grad_norm": float(norm), "lr": learner.optimizer.param_groups[0]["lr"]}
    work = cfg.log_every * cfg.batch_size * learner.module.layout.length
    log.write(step=step, **values, tokens_per_s=log.rate(work))


def main():
    # --- configuration, processes, data ---
    parts = {"model": MODELS, "condition": CONDITIONS}
    recipes = {name: recipe["prior"] for name, recipe in RECIPES.items()}
    configs = parse_flags(__doc__, (GPTConfig, DataConfig, PriorTrainConfig), parts, recipes, SIZES)
    model, model_cfg, data_cfg, cfg = settle(*configs)
    if cfg.dry_run:
        return say_sizes(model, model_cfg, data_cfg, cfg)
    procs = Processes(cfg.device, cfg.precision)
    cfg = resumed_schedule(cfg, procs)
    data = (model.data or load_images)(model, model_cfg, data_cfg, cfg, procs)

    # --- model and optimizer ---
    model = make_model(model, model_cfg, cfg, data)
    scaler = make_scaler(model, cfg, procs)
    forward = parallelize(model, procs, cfg, scaler)
    optimizer, ema = make_optimizer(model, cfg, cfg.optimizer == "muon"), EMA(model, cfg.ema)
    learners, start, n_cut = {"model": Learner(model, optimizer, scaler)}, 0, 0  # n_cut: captions cut by this process
    if cfg.resume:
        meta = load_state(cfg.out, learners, ema)
        start, n_cut = meta["step"], meta["n_cut"] if procs.main else 0
    config = read_config(cfg.out) if cfg.resume else {}  # what was added to it by hand, as "sampling", stays
    config |= {"kind": "prior", "model": asdict(model.cfg), "data": asdict(data_cfg), "train": asdict(cfg)}
    procs.say(
        f"{len(data.train_set)} training and {len(data.val_set)} validation samples; {data.text.n_vocab} text tokens; "
        f"{model.layout.n_prefix}+{model.cfg.n_image} positions; {n_params(model) / 1e6:.2f} M parameters; {procs}; "
        f"from step {start} to {cfg.steps}"
    )

    # --- the loop ---
    batches = step_batches(data.train_set, cfg, procs, start, data_cfg.workers, collate)
    log, step = Log(cfg.out, procs.main, start), start
    for step, evaluating, saving, ending in steps(cfg, procs, start):
        if evaluating:
            with ema.applied(model):
                log_evaluation(model, data, log, step, cfg, procs)
        if saving:
            check_finite(model, procs, step)
            save_run(cfg.out, config, step, learners, ema, n_cut=int(procs.sum([n_cut])[0]))
            if procs.main:
                model.after_save(cfg.out, data.text)
                if cfg.keep:
                    keep_copy(cfg.out, Path(cfg.out, f"step-{step:06d}"))
        if ending:
            break

        seed_step(cfg.seed, step, procs.rank)
        parts = next(batches)
        n_cut += sum(part.pop("n_cut") for part in parts)
        parts = corrupt(model, parts, step, cfg, procs)
        means = gradients(forward, model, parts, cfg, procs, scaler)
        norm = optimizer_step(model, optimizer, scaler, cfg, step)
        ema.update(model, step)

        if (step + 1) % cfg.log_every == 0:
            log_step(log, step + 1, means, norm, learners["model"], cfg, procs)
    procs.say(
        f"{cfg.out} holds step {step}; {data.skipped}; {int(procs.sum([n_cut])[0])} captions were too long and were cut"
    )


if __name__ == "__main__":
    run(main)
