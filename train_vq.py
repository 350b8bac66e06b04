"""Stage 1: train a tokenizer on pictures.

python train_vq.py --data path/to/pictures --out out/vq
python train_vq.py --data 'shards/{00000..00041}.tar' --out out/vq --size 256 --stride 8
python train_vq.py --data path/to/pictures --out out/vqgan --backbone vqgan --perceptual 1 --gan 0.8
torchrun --nproc_per_node 8 train_vq.py --data path/to/pictures --out out/vq --batch_size 256
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from minit2i.backbones import shrink
from minit2i.checkpoint import load_model, load_state, load_tensors, read_config, save_run
from minit2i.data import DataConfig, Pictures, Skipped, collate, grid_image, parse_size, split, step_batches
from minit2i.flags import parse_flags, pick
from minit2i.losses import LossConfig, Objective, parse_recon
from minit2i.metrics import code_stats, psnr, ssim
from minit2i.train import EMA, Log, Processes, TrainConfig
from minit2i.train import check_finite, make_optimizer, n_params, optimizer_step, run, seed_step, steps
from minit2i.vq import VQ, VQConfig


@dataclass(frozen=True)
class VQTrainConfig(LossConfig, TrainConfig):
    """How to train the tokenizer."""

    lr: Annotated[float, "peak learning rate"] = 1e-3
    finetune_decoder: Annotated[str, "train a new decoder on this folder's encoder and codebook, which stay"] = ""
    super_resolution: Annotated[str, "train an enlargement by --upscale of what this folder's tokenizer decodes"] = ""

    @property
    def base(self):
        return self.init or self.finetune_decoder or self.super_resolution

    @property
    def frozen(self):
        """Whether encoder and codebook stay as they are."""
        return bool(self.finetune_decoder or self.super_resolution)


DECODER = ("decoder", "decoder_ch", "decoder_n_res", "maps")  # the fields that a new decoder may change
UPSAMPLER = ("upscale", "sr_ch", "sr_blocks")


def settled(model_cfg, data_cfg, cfg):
    """The flags with what follows from them.  ValueError for those that do not go together."""
    laplace = "logit_laplace" in parse_recon(cfg.recon)
    if sum(map(bool, (cfg.init, cfg.finetune_decoder, cfg.super_resolution))) > 1:
        raise ValueError("use one of --init, --finetune_decoder and --super_resolution at a time")
    if model_cfg.upscale > 1 and not cfg.super_resolution:
        raise ValueError("--upscale needs --super_resolution, the folder of a tokenizer that is trained already")
    if laplace and cfg.super_resolution:
        raise ValueError("--super_resolution draws pictures, not distributions; use --recon l1 or l2")
    if not cfg.super_resolution:
        model_cfg = replace(model_cfg, maps=6 if laplace else 3)
    if cfg.init:
        model_cfg = replace(model_cfg, free_steps=0)  # a fixed codebook is set already
    size = data_cfg.size or (read_config(cfg.base)["data"]["size"] if cfg.base else "64")
    return model_cfg, replace(data_cfg, size=size), cfg


def load_data(data_cfg, cfg, upscale, p):
    """-> training set, validation set, Skipped.  Pictures are read `upscale` times as large as the tokenizer sees them."""
    height, width = (upscale * n for n in parse_size(data_cfg.size))
    data_cfg = replace(data_cfg, size=f"{height}x{width}", resize=data_cfg.resize * upscale)
    (source, train), (val_source, val) = split(data_cfg)
    train_set, val_set = Pictures(source, train, data_cfg, cfg.seed), Pictures(val_source, val, data_cfg)
    try:
        val_set[0]
    except ValueError:  # a few pictures, and the one kept for validation is bad
        val_set = Pictures(source, train, data_cfg)
    skipped = Skipped(p.say)
    skipped.add([*source.damaged, *(val_source.damaged if val_source is not source else ())])
    return train_set, val_set, skipped


def freeze(model, cfg):
    """Only the decoder, or the super-resolution, learns if cfg says so -> the names of the parts that stay."""
    names = ["encoder", "quantizer"] if cfg.finetune_decoder else []
    names = ["encoder", "quantizer", "decoder"] if cfg.super_resolution else names
    for name in names:
        getattr(model, name).requires_grad_(False)
    return names


def load_base(model, cfg):
    """The model that a run starts from: all of it for --init, what stays for a new decoder or super-resolution.

    A new decoder of the same shape starts as the old one.  ValueError where what stays would not be the same.
    """
    if cfg.init:
        return load_model(cfg.init, model).train()
    saved, now, free = pick(VQConfig, read_config(cfg.base)["model"]), model.cfg, DECODER
    if cfg.super_resolution:
        free = UPSAMPLER
        if now.upscale == 1:
            raise ValueError("--super_resolution needs --upscale 2 or 4")
    for name, value in asdict(now).items():
        if name not in free and value != getattr(saved, name):
            raise ValueError(
                f"--{name} {value} would change what stays of {cfg.base} ({getattr(saved, name)}); leave it out"
            )
    tensors, _ = load_tensors(Path(cfg.base, "model.safetensors"))
    own, stays = model.state_dict(), freeze(model, cfg)
    same = now == saved
    chosen = {k: v.to(own[k].dtype) for k, v in tensors.items() if k in own and (same or k.split(".")[0] in stays)}
    model.load_state_dict(own | chosen)


def make_model(model_cfg, data_cfg, cfg, p):
    """The tokenizer as the run starts: from chance, or from another run."""
    torch.manual_seed(cfg.seed)
    model = VQ(model_cfg).to(p.device)
    model.grid(*parse_size(data_cfg.size))
    if not cfg.base and 0 < cfg.steps <= model.quantizer.first_step:
        raise ValueError(
            f"free_steps {model_cfg.free_steps} leaves none of {cfg.steps} steps with a codebook; use {cfg.steps // 3}"
        )
    if cfg.base and not cfg.resume:
        load_base(model, cfg)
    freeze(model, cfg)
    return model


@torch.no_grad()
def evaluate(model, pictures, cfg, p):
    """The first validation pictures -> {name: measure} for the log, skipped, and a sheet of inputs and reconstructions."""
    measures = {"val_psnr": psnr} | ({"val_ssim": ssim} if min(pictures.size) >= 11 else {})  # windows of 11x11
    totals, counts, skipped, sheet = dict.fromkeys(measures, 0.0), torch.zeros(model.cfg.n_codes), [], None
    mine = list(range(min(cfg.eval_size, len(pictures))))[p.rank :: p.world]
    batch = cfg.batch_size // (cfg.accum * p.world)
    for first in range(0, len(mine), batch):
        images, _, skips = collate([pictures[i] for i in mine[first : first + batch]])
        skipped += skips
        images = images.to(p.device)
        with p.autocast():
            codes = model.encode(shrink(images, model.cfg.upscale))
            recon = model.decode(codes)
        for name, f in measures.items():
            totals[name] += float(f(recon, images).sum())
        counts += torch.bincount(codes.flatten(), minlength=model.cfg.n_codes).cpu()
        if sheet is None:
            sheet = grid_image(torch.cat([images[:12], recon[:12]]), len(images[:12]))
    n, *sums = p.sum([len(mine), *totals.values(), *counts.tolist()])
    use, perplexity = code_stats(torch.tensor(sums[len(totals) :]))
    values = {name: total / n for name, total in zip(totals, sums)}
    skipped = [s for part in p.gather(skipped) for s in part]
    return values | {"code_use": use, "val_perplexity": perplexity}, skipped, sheet


def gradients(forward, model, objective, parts, p, scaler, step):
    """Backward passes over the parts of a batch -> latents (N, C), codes (N,), {name: mean of a loss over the parts}."""
    latents, codes, sums = [], [], {}
    for k, images in enumerate(parts):
        last, small = k == len(parts) - 1, shrink(images, model.cfg.upscale)
        forward.require_backward_grad_sync = last
        with p.autocast():
            maps, z, c, quantizer_loss = forward(small, None if objective.cfg.frozen else step)
            picture = model.picture(maps)
            loss, values = objective(maps, picture, images, model.last_weight, step, scaler.get_scale())
        loss = loss + quantizer_loss.float()
        scaler.scale(loss / len(parts)).backward()
        values |= {"loss": loss.detach(), "mse": (picture.detach() - images).square().mean()}
        if objective.playing(step):
            with p.autocast():
                values["disc_loss"] = objective.adversary.judge(images, picture, len(parts), last)
        sums = {name: sums.get(name, 0.0) + v / len(parts) for name, v in values.items()}
        latents.append(z), codes.append(c)
    return torch.cat(latents), torch.cat(codes), sums


def main():
    # --- configuration, processes, data ---
    model_cfg, data_cfg, cfg = settled(*parse_flags(__doc__, VQConfig, DataConfig, VQTrainConfig))
    p = Processes(cfg.device, cfg.precision)
    train_set, val_set, skipped = load_data(data_cfg, cfg, model_cfg.upscale, p)

    # --- model and optimizer ---
    model = make_model(model_cfg, data_cfg, cfg, p)
    objective = Objective(cfg, p, p.precision, train_set.size)
    optimizer, ema, start = make_optimizer(model, cfg), EMA(model, cfg.ema), 0
    scaler = torch.amp.GradScaler(p.device.type, enabled=p.precision == "fp16")
    learners = {"": (model, optimizer, scaler)} | objective.parts
    if cfg.resume:
        meta = load_state(cfg.out, learners, ema)
        start, skipped.why = meta["step"], dict(meta["skipped"])
    forward = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if p.world > 1 else model
    if cfg.compile:
        torch._functorch.config.donated_buffer = False  # the adaptive weight goes through the graph more than once
        forward = torch.compile(forward)
    config = {"kind": "vq", "model": asdict(model_cfg), "data": asdict(data_cfg), "train": asdict(cfg)}
    p.say(
        f"{len(train_set)} training and {len(val_set)} validation pictures; {n_params(model) / 1e6:.2f} M parameters; "
        f"{p}; from step {start} to {cfg.steps}"
    )

    # --- the loop ---
    train_set[start * cfg.batch_size]  # nothing usable: say so here, not in a worker
    batches = step_batches(train_set, cfg, p, start, data_cfg.workers, collate)
    log, step = Log(cfg.out, p.main, start), start
    for step, evaluating, saving, ending in steps(cfg, p, start):
        if evaluating:
            with ema.applied(model):
                values, skips, sheet = evaluate(model, val_set, cfg, p)
                check_finite(model, p, step, values)
            skipped.add(skips)
            log.evaluation(step, values, ["loss", "psnr", "perplexity"], sheet, "reconstructions")
            p.say(
                f"\nstep {step}: val PSNR {values['val_psnr']:.2f} dB, {values['code_use']:.1%} of the codes used, "
                f"perplexity {values['val_perplexity']:.0f}"
            )
        if saving:
            check_finite(model, p, step)
            skipped.add([s for part in p.gather(list(skipped.why.items())) for s in part])
            save_run(p, cfg.out, config, step, learners, ema, skipped=list(skipped.why.items()))
        if ending:
            break

        seed_step(cfg.seed, step, p.rank)
        parts = next(batches)
        skipped.add([s for _, _, skips in parts for s in skips])
        parts = [images.to(p.device, non_blocking=True) for images, _, _ in parts]
        if step == model.quantizer.first_step and not cfg.base:
            with torch.no_grad(), p.autocast():
                model.quantizer.start(torch.cat([model.latents(images).flatten(0, 2) for images in parts]))
        latents, codes, sums = gradients(forward, model, objective, parts, p, scaler, step)
        norm = optimizer_step(model, optimizer, scaler, cfg, step)
        if not cfg.frozen:
            model.quantizer.update(latents, codes, step)
        ema.update(model, step)
        if objective.playing(step):
            objective.adversary.step(step)

        if (step + 1) % cfg.log_every == 0:
            values = dict(zip(sums, (v / p.world for v in p.sum([float(v) for v in sums.values()]))))
            values["psnr"] = float(10 * torch.tensor(4 / values.pop("mse")).log10())
            values |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
            values["perplexity"] = code_stats(model.quantizer.ema_count)[1]
            log.write(step=step + 1, **values, images_per_s=log.rate(cfg.log_every * cfg.batch_size))
    p.say(f"{cfg.out} holds step {step}; {skipped}")


if __name__ == "__main__":
    run(main)
