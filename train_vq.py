"""Stage 1: train a tokenizer on images.

python train_vq.py --data path/to/images --out out/vq
python train_vq.py --ch 32 --n_res 1 --batch_size 16 --steps 600 --lr 2e-3 --out out/vq          without a GPU
python train_vq.py --data path/to/images --recipe taming --out out/vqgan                          a paper's tokenizer
python train_vq.py --data path/to/images --perceptual vgg --discriminator patch --out out/sharp   VQGAN's losses
python train_vq.py --data path/to/images --init out/vq --train decoder --decoder_ch 128 --out out/vq2
python train_vq.py --data path/to/images --init out/vq --train upsampler --upsampler wdsr --out out/vq-x2
torchrun --nproc_per_node 8 train_vq.py --data 'shards/{00000..00041}.tar' --out out/vq --batch_size 256
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
from torch.nn.parallel import DistributedDataParallel

from minit2i import tokenizer_losses, vq
from minit2i.checkpoint import load_model, read_config
from minit2i.collectives import gather_objects
from minit2i.config import Group, above
from minit2i.data import DataConfig, Images, NoneUsable, Skipped, collate, parse_size, split, step_batches
from minit2i.flags import describe, parse_flags
from minit2i.metrics import code_stats, psnr, ssim
from minit2i.papers import RECIPES
from minit2i.papers.parti import FROZEN, load_frozen
from minit2i.plot import captioned_grid
from minit2i.resume import Learner, load_state, save_run
from minit2i.tokenizer_losses import LossConfig, Objective, output_of
from minit2i.train import EMA, EVAL_SIZE, Log, Processes, TrainConfig, check_finite, make_optimizer, n_params
from minit2i.train import check_loss, optimizer_step, resumed_schedule, run, seed_step, steps
from minit2i.vq import VQ, VQConfig, shrink


@dataclass(frozen=True)
class VQDataConfig(DataConfig):
    """The tokenizer's images."""

    flip: Annotated[bool, "mirror half of the training images"] = False
    captions: Annotated[bool, "use only images that have a caption, as the prior will"] = True


@dataclass(frozen=True)
class VQTrainConfig(LossConfig, TrainConfig):
    """How to train the tokenizer."""

    train: Annotated[str, "the part of --init to train", Group("Run"), ("all", "decoder", "upsampler")] = "all"
    lr: Annotated[float, "peak learning rate", Group("Optimizer"), above(0)] = 1e-3


def settle(model_cfg, data_cfg, cfg):
    """Fill in dependent settings, reject conflicting ones (ValueError) -> the three configs."""
    if cfg.train != "all" and not cfg.init:
        raise ValueError(f"--train {cfg.train} needs --init, the folder of a trained tokenizer")
    if (model_cfg.upsampler != "none") != (cfg.train == "upsampler"):
        raise ValueError("an upsampler needs a trained tokenizer: use --init X --train upsampler --upsampler wdsr")
    if cfg.train == "upsampler" and output_of(cfg.recon) != "rgb":
        raise ValueError(f"an upsampler gives images, not distributions: --recon {cfg.recon} needs l1 or l2 instead")
    if cfg.train != "upsampler":
        model_cfg = replace(model_cfg, output=output_of(cfg.recon))
    size = data_cfg.image_size or (read_config(cfg.init)["data"].get("image_size") if cfg.init else "") or "64"
    return model_cfg, replace(data_cfg, image_size=size), cfg


def say_size(model_cfg, data_cfg, cfg):
    """--dry_run: print the resolved settings and the model's size."""
    with torch.device("meta"):
        model = VQ(model_cfg)
    height, width = model.grid(*parse_size(data_cfg.image_size))
    print(describe((model_cfg, data_cfg, cfg)))
    print(f"{n_params(model) / 1e6:.2f} M parameters, {height}x{width} codes per image")


def load_data(data_cfg, cfg, upscale, procs):
    """-> training images, validation images, Skipped.  Images are `upscale` times as large as the tokenizer's input."""
    height, width = (upscale * n for n in parse_size(data_cfg.image_size))
    data_cfg = replace(data_cfg, image_size=f"{height}x{width}", resize=data_cfg.resize * upscale)
    (source, train), (val_source, val) = split(data_cfg)
    train_set = Images(source, train, data_cfg, cfg.seed, data_cfg.captions, data_cfg.flip)
    val_set = Images(val_source, val, data_cfg, captions=data_cfg.captions)
    skipped = Skipped(procs.say)
    skipped.add([*source.skipped, *(val_source.skipped if val_source is not source else ())])
    try:
        val_set[0]
    except NoneUsable as e:  # a handful of images, and the one kept for validation is bad
        skipped.add(e.skipped)
        val_set = Images(source, train, data_cfg, captions=data_cfg.captions)
    return train_set, val_set, skipped


def in_steps(model_cfg, steps):
    """The tokenizer's config with schedules in steps: values below 1 are shares of the training."""
    shares = {k: v for k, v in asdict(model_cfg).items() if k.endswith("_steps") and 0 < v < 1}
    return replace(model_cfg, **{k: round(v * steps) for k, v in shares.items()})


def make_model(model_cfg, data_cfg, cfg, device):
    """The tokenizer as the run starts: randomly initialised, or from --init."""
    torch.manual_seed(cfg.seed)
    model = VQ(model_cfg)
    model.to(device, memory_format=model.image_format(device))
    model.grid(*parse_size(data_cfg.image_size))
    model.quantizer.cfg = in_steps(model_cfg, cfg.steps)
    if cfg.init:
        model.quantizer.first_step = 0  # its codebook is trained already
    elif 0 < cfg.steps <= model.quantizer.first_step:
        raise ValueError(
            f"free_steps {model.quantizer.first_step} leaves none of {cfg.steps} steps with a codebook; "
            f"use {cfg.steps // 3}"
        )
    if cfg.init and not cfg.resume and cfg.train == "all":
        load_model(cfg.init, model).train()
    elif cfg.init and not cfg.resume:
        load_frozen(model, cfg.init, cfg.train)
    for name in FROZEN[cfg.train]:
        getattr(model, name).requires_grad_(False)
    return model


@torch.no_grad()
def evaluate(model, images, cfg, procs):
    """The first EVAL_SIZE validation images -> {name: value}, the entries that could not be used."""
    measures = {"val_psnr": psnr} | ({"val_ssim": ssim} if min(images.size) >= 11 else {})  # windows of 11x11
    totals, counts, skipped = dict.fromkeys(measures, 0.0), torch.zeros(model.cfg.n_codes), []
    mine = list(range(min(EVAL_SIZE, len(images))))[procs.rank :: procs.world]
    size = cfg.batch_size // (cfg.accum * procs.world)
    for first in range(0, len(mine), size):
        batch, _, skips = collate([images[i] for i in mine[first : first + size]])
        skipped, batch = skipped + skips, batch.to(procs.device)
        with procs.autocast():
            codes = model.encode(shrink(batch, model.cfg.upscale))
            recon = model.decode(codes)
        for name, f in measures.items():
            totals[name] += float(f(recon, batch).sum())
        counts += torch.bincount(codes.flatten(), minlength=model.cfg.n_codes).cpu()
    n, *sums = procs.sum([len(mine), *totals.values(), *counts.tolist()])
    use, perplexity = code_stats(torch.tensor(sums[len(totals) :]))
    values = {name: total / n for name, total in zip(totals, sums)} | {"code_use": use, "val_perplexity": perplexity}
    return values, [s for part in gather_objects(skipped) for s in part]


@torch.no_grad()
def reconstruction_grid(model, train_set, val_set, procs):
    """PIL image: training images on the left, validation images on the right, each above its reconstruction."""
    n = min(6, len(train_set), len(val_set))
    images = collate([images[i] for images in (train_set, val_set) for i in range(n)])[0].to(procs.device)
    with procs.autocast():
        recon = model.decode(model.encode(shrink(images, model.cfg.upscale)))
    return captioned_grid(torch.stack([images, recon]).cpu(), [])


def report(model, train_set, val_set, log, cfg, procs, step):
    """Evaluate, log the values and save the grid -> the entries that could not be used."""
    values, skips = evaluate(model, val_set, cfg, procs)
    check_finite(model, procs, step, values)
    grid = reconstruction_grid(model, train_set, val_set, procs) if procs.main else None
    log.evaluation(step, values, ["loss", "psnr", "perplexity"], grid, "reconstructions")
    procs.say(
        f"\nstep {step}: val PSNR {values['val_psnr']:.2f} dB, {values['code_use']:.1%} of the codes used, "
        f"perplexity {values['val_perplexity']:.0f}"
    )
    return skips


def backward(forward, model, objective, micro_batches, learners, procs, step):
    """Accumulate the gradients of a step -> latents (N, C), codes (N,), {name: mean over the micro-batches}."""
    latents, codes, sums, n = [], [], {}, len(micro_batches)
    scaler, adversary = learners["model"].scaler, objective.adversary_at(step)
    for k, images in enumerate(micro_batches):
        forward.require_backward_grad_sync = k == n - 1  # DDP: only the last micro-batch exchanges gradients
        with procs.autocast():
            small = shrink(images, model.cfg.upscale)
            maps, z, c, quantizer_loss = forward(small, train=objective.cfg.train == "all", step=step)
            recon = model.to_image(maps)
            loss, values = objective(maps, recon, images, model.last_weight, step, scaler.get_scale())
        loss = loss + quantizer_loss.float()
        scaler.scale(loss / n).backward()
        values |= {"loss": loss.detach(), "mse": (recon.detach() - images).square().mean()}
        if adversary:
            adversary.forward.require_backward_grad_sync = k == n - 1
            with procs.autocast():
                loss, more = adversary.discriminator_loss(recon, images, step)
            learners["discriminator"].scaler.scale(loss / n).backward()
            values |= more
        sums = {name: sums.get(name, 0.0) + v / n for name, v in values.items()}
        latents, codes = [*latents, z], [*codes, c]
    return torch.cat(latents), torch.cat(codes), sums


def make_learners(model, objective, procs):
    """The tokenizer, and the discriminator if there is one, each with AdamW and, in fp16, a gradient scaler."""
    modules = {"model": (model, objective.cfg)}
    if objective.adversary:
        modules["discriminator"] = (objective.adversary.net, objective.adversary.cfg)
    kind, fp16 = procs.device.type, procs.precision == "fp16"
    return {
        name: Learner(module, make_optimizer(module, cfg), torch.amp.GradScaler(kind, enabled=fp16))
        for name, (module, cfg) in modules.items()
    }


def update(learners, objective, step):
    """One optimizer step of the tokenizer, and of an active discriminator -> the tokenizer's gradient norm."""
    if adversary := objective.adversary_at(step):
        learner = learners["discriminator"]
        optimizer_step(learner.module, learner.optimizer, learner.scaler, adversary.cfg, step)
    learner = learners["model"]
    return optimizer_step(learner.module, learner.optimizer, learner.scaler, objective.cfg, step)


def log_step(log, step, sums, norm, learner, cfg, procs):
    """Write a training step's losses, averaged over the processes, to the log."""
    values = dict(zip(sums, (v / procs.world for v in procs.sum([float(v) for v in sums.values()]))))
    check_loss(values["loss"], learner.module, procs, step)
    values["psnr"] = float(10 * torch.tensor(4 / values.pop("mse")).log10())
    values |= {"grad_norm": float(norm), "lr": learner.optimizer.param_groups[0]["lr"]}
    values["perplexity"] = code_stats(learner.module.quantizer.ema_count)[1]
    log.write(step=step, **values, images_per_s=log.rate(cfg.log_every * cfg.batch_size))


def main():
    # --- config, processes, data ---
    recipes = {name: recipe["vq"] for name, recipe in RECIPES.items()}
    configs = (VQConfig, VQDataConfig, VQTrainConfig)
    model_cfg, data_cfg, cfg = settle(*parse_flags(__doc__, configs, vq.PARTS | tokenizer_losses.PARTS, recipes))
    if cfg.dry_run:
        return say_size(model_cfg, data_cfg, cfg)
    procs = Processes(cfg.device, cfg.precision)
    cfg = resumed_schedule(cfg, procs)
    train_set, val_set, skipped = load_data(data_cfg, cfg, model_cfg.upscale, procs)

    # --- model, optimizer ---
    model = make_model(model_cfg, data_cfg, cfg, procs.device)
    objective, ema, start = Objective(cfg, train_set.size, procs.device), EMA(model, cfg.ema), 0
    learners = make_learners(model, objective, procs)
    if cfg.resume:
        meta = load_state(cfg.out, learners, ema)
        start, skipped.why = meta["step"], dict(meta["skipped"])
    forward = DistributedDataParallel(model, broadcast_buffers=False) if procs.world > 1 else model
    if cfg.compile:
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the graph more than once
        forward = torch.compile(forward)
    config = {"kind": "vq", "model": asdict(model_cfg), "data": asdict(data_cfg), "train": asdict(cfg)}
    procs.say(
        f"{len(train_set)} training and {len(val_set)} validation images; {n_params(model) / 1e6:.2f} M parameters; "
        f"{procs}; from step {start} to {cfg.steps}"
    )

    # --- loop ---
    train_set[start * cfg.batch_size]  # if no image can be used, say so here and not in a worker
    batches = step_batches(train_set, cfg, procs, start, data_cfg.workers, collate)
    log, step = Log(cfg.out, procs.main, start), start
    for step, evaluating, saving, ending in steps(cfg, procs, start):
        for learner in learners.values() if evaluating or saving else ():
            check_finite(learner.module, procs, step)
        if evaluating:
            with ema.applied(model):
                skipped.add(report(model, train_set, val_set, log, cfg, procs, step))
        if saving:
            skipped.add([s for part in gather_objects(list(skipped.why.items())) for s in part])
            save_run(cfg.out, config, step, learners, ema, skipped=list(skipped.why.items()))
        if ending:
            break

        seed_step(cfg.seed, step, procs.rank)
        batch = next(batches)
        skipped.add([s for _, _, skips in batch for s in skips])
        batch = [images.to(procs.device, non_blocking=True) for images, _, _ in batch]
        if step == model.quantizer.first_step and not cfg.init:
            with torch.no_grad(), procs.autocast():
                model.quantizer.start(torch.cat([model.latents(images).flatten(0, 2) for images in batch]))
        latents, codes, sums = backward(forward, model, objective, batch, learners, procs, step)
        norm = update(learners, objective, step)
        if cfg.train == "all":
            model.quantizer.update(latents, codes, step)
        ema.update(model, step)
        if (step + 1) % cfg.log_every == 0:
            log_step(log, step + 1, sums, norm, learners["model"], cfg, procs)
    procs.say(f"{cfg.out} holds step {step}; {skipped}")


if __name__ == "__main__":
    run(main)
