"""Stage 2: train a prior on captions and the codes of a frozen tokenizer.

    python train_prior.py --data path/to/pictures --vq out/vq --out out/prior
    torchrun --nproc_per_node 8 train_prior.py --data 'shards/{00000..00041}.tar' --vq out/vq --out out/prior \\
        --batch_size 512 --n_layer 12 --n_embd 768 --n_head 12
    python train_prior.py --objective masked ...                         MaskGIT, Muse
    python train_prior.py --objective text --data book.txt ...           a language model, for --init_lm OUT/lm
    python train_prior.py --objective contrast --n_encoder 4 ...         a text encoder for --init, and --rerank contrastive
    python train_prior.py --init out/prior --order image ...             a captioner
    python train_prior.py --init out/prior --size 128 --low 2 ...        token super-resolution
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from minit2i.backbones import shrink
from minit2i.checkpoint import load_model, load_state, read_config, save_run, write_file
from minit2i.contrast import Contrast, evaluate_towers, fit_encoder
from minit2i.data import DataConfig, Skipped, captions, grid_image, parse_size, split, step_batches
from minit2i.flags import parse_flags, pick
from minit2i.fp16 import make_scaler
from minit2i.gpt import GPT, SIZES, GPTConfig, fit_grid
from minit2i.lm import LM_SHAPE, in_shape, lm_text, load_lm, read_text, save_lm, text_windows
from minit2i.masked import hide_each
from minit2i.parallel import DTYPES, parallelize, sync_gradients, unsharded
from minit2i.plan import say_plan
from minit2i.sample import SampleConfig, draw_codes, file_hash, load_vq, write_captions
from minit2i.t5 import T5Text
from minit2i.tokens import CodeCache, Coded, Crops, Text
from minit2i.train import EMA, Log, Processes, TrainConfig
from minit2i.train import check_finite, make_optimizer, n_params, optimizer_step, run, seed_step, steps


@dataclass(frozen=True)
class PriorTrainConfig(TrainConfig):
    """How to train the prior."""

    vq: Annotated[str, "the tokenizer's checkpoint folder; a resumed run uses its own copy"] = "out/vq"
    cache: Annotated[str, "where the pictures' codes are kept, for this and later runs"] = "out/cache"
    text_encoder: Annotated[
        str, "folder of a frozen T5 v1.1 encoder, Hugging Face layout, that reads the captions; no text loss then"
    ] = ""
    init_lm: Annotated[
        str,
        "folder of a language model (Llama family, Hugging Face layout) whose shape, words and weights to start from",
    ] = ""
    init_lm_weights: Annotated[
        bool, "start from its weights too, not at random (arXiv:2311.16201 compares the two)"
    ] = True
    crops: Annotated[int, "crops of each picture in the cache; 1: the central one"] = 1
    vocab_size: Annotated[int, "tokens of the text model, trained at the first run"] = 2048
    bpe_dropout: Annotated[float, "probability to leave out a merge of the text model in training"] = 0.1
    cond_drop: Annotated[float, "probability to drop the caption, for guidance"] = 0.1
    text_weight: Annotated[float, "weight of the text tokens' mean loss"] = 1 / 8
    image_weight: Annotated[float, "weight of the image tokens' mean loss"] = 7 / 8
    strategy: Annotated[str, "several processes: replicas of the model, or parts of it (FSDP2)", ("ddp", "fsdp")] = (
        "ddp"
    )
    model_size: Annotated[str, "a named size (SIZES of gpt.py); flags of the model win over it", ("", *SIZES)] = ""
    plan: Annotated[int, "train nothing, print what this would need on so many processes; 0: train"] = 0
    peak_tflops: Annotated[float, "of a process, for --plan; 312 is an A100's in bf16"] = 312.0
    mfu: Annotated[float, "part of the peak that is reached, for --plan"] = 0.4
    block_scale: Annotated[bool, "a gradient scale for each block instead of one for the loss (DALL-E)"] = False
    powersgd: Annotated[int, "rank to which PowerSGD compresses the gradients that replicas exchange; 0: off"] = 0
    checkpoint_activations: Annotated[bool, "less memory: blocks compute again in the backward pass"] = False
    label_smoothing: Annotated[float, "masked objective: smoothing of the targets in training (MaskGIT)"] = 0.1
    steps: Annotated[int, "optimizer steps"] = 10000
    lr: Annotated[float, "peak learning rate"] = 1e-3
    weight_decay: Annotated[float, "decoupled weight decay, on matrices only"] = 0.045
    optimizer: Annotated[str, "muon: Muon for the matrices within blocks, AdamW for the rest", ("adamw", "muon")] = (
        "adamw"
    )
    ema: Annotated[float, "decay of the averaged weights, which are the ones saved; 0: none"] = 0.999

    @property
    def named(self):
        return SIZES.get(self.model_size, {})


# --- what goes together --------------------------------------------------------------------------------


def check_contrast(cfg):
    """ValueError for flags that two towers have no use for."""
    if cfg.plan:
        raise ValueError("--plan counts priors, not the towers of --objective contrast")
    if cfg.accum > 1 or cfg.strategy != "ddp" or cfg.block_scale:
        raise ValueError(
            "--objective contrast compares the whole batch at once, in replicas: use --accum 1, --strategy ddp and "
            "--no-block_scale, with --checkpoint_activations if memory is short"
        )
    if cfg.text_encoder or cfg.init_lm or cfg.init and not cfg.resume and read_config(cfg.init)["kind"] != "contrast":
        raise ValueError("--objective contrast starts from chance, or with --init from its like; leave out the others")


def settled(model_cfg, data_cfg, cfg):
    """The flags with what follows from them.  ValueError for those that do not go together."""
    lm, contrast = (model_cfg.objective == name for name in ("text", "contrast"))
    if contrast:
        check_contrast(cfg)
    if lm and (cfg.init or cfg.text_encoder or model_cfg.n_encoder or model_cfg.order == "image"):
        raise ValueError(
            "--objective text trains words alone; leave out --init, --text_encoder, --n_encoder and --order image"
        )
    if cfg.init and not cfg.resume and read_config(cfg.init)["kind"] == "lm":
        raise ValueError(f"{cfg.init} is a language model: start from it with --init_lm {Path(cfg.init, 'lm')}")
    if not data_cfg.captions:
        raise ValueError("--no-captions is for train_vq.py: the prior needs captions")
    if data_cfg.flip and cfg.crops == 1:
        raise ValueError("--flip needs --crops 2 or more: the one central crop is never mirrored")
    if cfg.init_lm and (cfg.init or cfg.text_encoder):
        raise ValueError("--init_lm brings words and weights of its own; leave out --init and --text_encoder")
    if model_cfg.n_states and not cfg.text_encoder:
        raise ValueError("a frozen T5 read this prior's captions: name its folder with --text_encoder")
    if cfg.init_lm and not cfg.resume:
        model_cfg = in_shape(model_cfg, cfg.init_lm)
    if contrast:  # each caption counts: none is dropped
        cfg = replace(cfg, cond_drop=0.0)
    if lm:
        return replace(model_cfg, **LM_SHAPE), data_cfg, replace(cfg, text_weight=1.0, image_weight=0.0)
    return model_cfg, replace(data_cfg, size=data_cfg.size or read_config(tokenizer(cfg))["data"]["size"]), cfg


def tokenizer(cfg):
    """The folder of the tokenizer; a run that goes on has its own copy."""
    return Path(cfg.out, "vq") if cfg.resume else Path(cfg.vq)


# --- data ----------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run learns from, and what shows how far it is.  A text file has no pictures, and one code of one kind."""

    text: Text | T5Text
    train_set: torch.utils.data.Dataset
    val_set: torch.utils.data.Dataset
    vq: torch.nn.Module | None = None
    n_codes: int = 1
    grid: tuple = (1, 1)
    prompts: list | None = None  # captions of the first validation pictures
    skipped: Skipped | str = "no pictures"


def collate(samples):
    """[(ids, codes, low, cut)] -> text (B, T), codes (B, N), low-resolution codes (B, M), number of captions cut."""
    text, codes, low, cut = zip(*samples)
    return torch.stack(text), torch.stack(codes), torch.stack(low), sum(cut)


def keep_inputs(cfg, source, indices):
    """What a new run has a copy of: the tokenizer and, unless T5 reads the captions, a text model, trained now if need be."""
    for name in ("config.json", "model.safetensors"):
        write_file(Path(cfg.out, "vq", name), Path(cfg.vq, name).read_bytes())
    if cfg.text_encoder:
        return
    if cfg.init_lm:
        words = lm_text(cfg.init_lm)
    elif cfg.init:
        words = Path(cfg.init, "text.model").read_bytes()
    else:  # 50,000 entries at most, evenly spaced over the training set
        words = Text.train(captions(source, indices[:: -(-len(indices) // 50_000)]), cfg.vocab_size)
    write_file(Path(cfg.out, "text.model"), words)


def read_captions(cfg, length, sets, p):
    """What turns captions into text ids or, with --text_encoder, into states that are in the cache from now on."""
    if not cfg.text_encoder:
        return Text(Path(cfg.out, "text.model").read_bytes(), length)
    text = T5Text(cfg.text_encoder, length, p.device, DTYPES[p.precision])
    text.remember([line for some in sets for line in captions(*some)], cfg.cache, p)
    return text


def code_cache(crops, cfg, vq, p, low=1):
    """The codes of a set's crops, shrunk `low` times, encoded now if they are not in the cache yet."""
    folder = Path(cfg.cache, f"codes-{vq.hash}-{crops.digest()}" + (f"-low{low}" if low > 1 else ""))
    if any(p.gather(not folder.exists())):
        height, width = (s // low for s in crops.pictures.size)

        def encode(images):
            with p.autocast():
                return vq.encode(shrink(images.to(p.device), low))

        CodeCache.build(folder, crops, encode, vq.grid(height, width), vq.cfg.n_codes, p)
    return CodeCache(folder)


def load_pictures(model_cfg, data_cfg, cfg, p):
    """Captions -> text model, pictures -> codes, once.  ValueError if --init knows the codes of another tokenizer."""
    vq = load_vq(tokenizer(cfg), p.device)
    if cfg.init and not cfg.resume and file_hash(theirs := Path(cfg.init, "vq", "model.safetensors")) != vq.hash:
        raise ValueError(
            f"{cfg.init} was trained on the codes of another tokenizer than {cfg.vq}; use --vq {theirs.parent}"
        )
    grid = vq.grid(*parse_size(data_cfg.size))
    sets = (source, train), (val_source, val) = split(data_cfg)
    if p.main and not cfg.resume:
        keep_inputs(cfg, source, train)
    p.barrier()
    text = read_captions(cfg, model_cfg.text_len, sets, p)
    crops, val_crops = Crops(source, train, data_cfg, cfg.crops, cfg.seed), Crops(val_source, val, data_cfg)
    cache, val_cache = code_cache(crops, cfg, vq, p), code_cache(val_crops, cfg, vq, p)
    if not val_cache.ok.any():  # a few pictures, and the one kept for validation is bad
        val_source, val, val_crops, val_cache = source, train, crops, cache
    skipped = Skipped(p.say)
    skipped.add([*source.damaged, *cache.skipped, *val_cache.skipped])
    p.say(str(skipped))
    low, val_low = (code_cache(c, cfg, vq, p, model_cfg.low) if model_cfg.low else None for c in (crops, val_crops))
    train_set = Coded(source, train, cache, text, cfg.seed, cfg.bpe_dropout, cfg.cond_drop, low)
    val_set = Coded(val_source, val, val_cache, text, low=val_low)
    prompts = [val_source.captions(int(val[row]))[0] for row in val_set.rows[:8]]
    return Data(text, train_set, val_set, vq, vq.cfg.n_codes, grid, prompts, skipped)


def load_text(model_cfg, data_cfg, cfg, p):
    """--objective text: the plain text file --data -> its text model, training and validation windows."""
    paragraphs, path = read_text(data_cfg.data), Path(cfg.out, "text.model")
    if p.main and not cfg.resume:
        write_file(path, lm_text(cfg.init_lm) if cfg.init_lm else Text.train(paragraphs, cfg.vocab_size))
    p.barrier()
    text = Text(path.read_bytes(), model_cfg.text_len)
    return Data(text, *text_windows(paragraphs, text, data_cfg.val_fraction, cfg.seed))


# --- the model, and a step ------------------------------------------------------------------------------


def check_resume(model_cfg, text, cfg):
    """ValueError if --init or --resume goes on from what these flags cannot."""
    folder = cfg.out if cfg.resume else cfg.init
    before = read_config(folder)
    if before.get("text_encoder", {}).get("hash") != (text.hash if cfg.text_encoder else None):
        raise ValueError(
            "--init and --resume cannot change what reads the captions of "
            f"{folder} (text_encoder in its config.json); use another --text_encoder"
        )
    if cfg.resume and model_cfg != pick(GPTConfig, before["model"]):
        raise ValueError(f"--resume cannot change the code grid of {folder}; use another --out")
    if cfg.resume and cfg.block_scale != before["train"].get("block_scale", False):
        raise ValueError(
            f"--resume cannot change --block_scale: the scales of {folder} would be lost; use another --out"
        )
    if cfg.resume and cfg.optimizer != before["train"].get("optimizer", "adamw"):
        raise ValueError(
            f"--resume cannot change --optimizer: the state in {folder} is the other's; use --init instead"
        )


def make_model(model_cfg, cfg, data):
    """The model as it starts, from chance, --init or --init_lm.  ValueError if it is not what a resumed run has trained."""
    torch.manual_seed(cfg.seed)
    (grid_h, grid_w), contrast = data.grid, model_cfg.objective == "contrast"
    model_cfg = replace(model_cfg, n_vocab=data.text.n_vocab, n_codes=data.n_codes, grid_h=grid_h, grid_w=grid_w)
    if cfg.text_encoder:
        model_cfg = replace(model_cfg, n_states=data.text.width)
    if cfg.init or cfg.resume:
        check_resume(model_cfg, data.text, cfg)
    model = (Contrast if contrast else GPT)(model_cfg)
    if not (model.masked or contrast):
        model.check_causal()
    if model.text_ahead and cfg.text_weight and model_cfg.text_loss:
        raise ValueError(f"mask {model_cfg.mask} shows text what it should predict: it needs --text_weight 0")
    if cfg.init and not cfg.resume:
        towers = read_config(cfg.init)["kind"] == "contrast" and not contrast
        load_model(cfg.init, model, fit_encoder if towers else fit_grid).train()
    if cfg.init_lm and cfg.init_lm_weights and not cfg.resume:
        load_lm(cfg.init_lm, model)
    return model


@torch.no_grad()
def evaluate(model, coded, cfg, p):
    """The first validation pictures -> text and image loss per token, in nats; a masked model's over fixed masks."""
    n, batch = min(cfg.eval_size, len(coded)), cfg.batch_size // (cfg.accum * p.world)
    if model.cfg.objective == "contrast":
        found = evaluate_towers(model, [coded[i][:2] for i in range(n)])
        return dict(zip(("val_text_loss", "val_image_loss", "val_retrieval"), found))
    sums, mine = [0.0, 0, 0.0, 0], list(range(n))[p.rank :: p.world]
    for first in range(0, -(-n // p.world), batch):
        some = mine[first : first + batch]
        rows = some or [0]  # a sharded model needs all processes in every pass
        text, codes, low, _ = collate([coded[i] for i in rows])
        shown, n_image = None, codes.numel()
        if model.masked:
            shown = hide_each(codes, rows)
            n_image = int((shown < 0).sum())
        with p.autocast():
            text_loss, image_loss = model(*(x if x is None else x.to(p.device) for x in (text, codes, low, shown)))
        if some:
            n_text = int(model.n_text_targets(text))
            sums = [a + float(b) for a, b in zip(sums, (text_loss, n_text, image_loss, n_image))]
    sums = p.sum(sums)
    return {"val_text_loss": sums[0] / max(1, sums[1]), "val_image_loss": sums[2] / sums[3]}


def draw_samples(model, data, cfg, device):
    """Two pictures for each of some validation captions, as one sheet, a column a caption -> sheet, captions.

    A captioner is shown their pictures instead, and the captions are its own.
    """
    samples = collate([data.val_set[i] for i in range(len(data.prompts))])
    ids, codes, low = (x.to(device) for x in samples[:3])
    text, grid, settings = data.text, data.grid, SampleConfig(n=2, seed=cfg.seed)
    if model.cfg.order == "image":
        settings = replace(settings, n=1, temperature=0.0)
        ids = write_captions(model, codes, text.sp.bos_id(), text.sp.eos_id(), settings)
        return grid_image(data.vq.decode(codes.view(-1, *grid)), len(codes)), [text.decode(row) for row in ids]
    low = low.repeat_interleave(2, 0) if low.shape[1] else None
    codes = draw_codes(model, ids, text.encode("").to(device), settings, None, low)
    images = data.vq.decode(codes.view(-1, *grid)).unflatten(0, (-1, 2))  # (B, 2, 3, H, W)
    return grid_image(images.transpose(0, 1).flatten(0, 1), len(ids)), data.prompts


def hidden(model, parts, cfg, step, p):
    """What a masked prior or the two towers are shown of each part of a batch; None for a model that sees all."""
    contrast, size = model.cfg.objective == "contrast", len(parts[0][0])
    if not (model.masked or contrast):
        return [None] * len(parts)
    # by the sample's place in the run, whichever process has it
    first = cfg.seed * 1_000_003 + step * cfg.batch_size + p.rank * cfg.accum * size
    seeds = [range(first + k * size, first + (k + 1) * size) for k in range(len(parts))]
    if contrast:
        return [hide_each(part[0], s, model.hide) for part, s in zip(parts, seeds)]
    return [hide_each(part[1], s) for part, s in zip(parts, seeds)]


def gradients(forward, model, parts, shown, cfg, p, scaler):
    """Backward passes over the parts of a batch -> this process's share of the mean text and image loss (2,)."""
    if model.cfg.objective == "contrast":
        n_text, n_image = (shown[0][:, 1] >= 0).sum(), cfg.batch_size
    else:
        n_text, n_image = sum(model.n_text_targets(part[0]) for part in parts), cfg.batch_size * model.cfg.n_image
    n_text = p.total(n_text.float()).clamp_min(1)
    if model.masked:
        n_image = p.total(sum((codes < 0).sum() for codes in shown).float())
    sums = torch.zeros(2, device=p.device)
    for k, (*batch, _) in enumerate(parts):
        sync_gradients(forward, k == cfg.accum - 1)
        with p.autocast():
            batch = (x if x is None else x.to(p.device) for x in (*batch, shown[k]))
            text_loss, image_loss = forward(*batch, cfg.label_smoothing if model.masked else 0.0)
        loss = cfg.text_weight * text_loss / n_text + cfg.image_weight * image_loss / n_image
        scaler.scale(loss * p.world).backward()  # x world: it takes the mean, and these are parts of a sum
        sums += torch.stack([text_loss.detach() / n_text, image_loss.detach() / n_image])
    return sums


def main():
    # --- configuration, processes, data ---
    model_cfg, data_cfg, cfg = parse_flags(__doc__, GPTConfig, DataConfig, PriorTrainConfig)
    lm, contrast = (model_cfg.objective == name for name in ("text", "contrast"))
    if cfg.plan and not contrast:
        return say_plan(model_cfg, data_cfg, cfg)
    model_cfg, data_cfg, cfg = settled(model_cfg, data_cfg, cfg)
    p = Processes(cfg.device, cfg.precision)
    data = (load_text if lm else load_pictures)(model_cfg, data_cfg, cfg, p)

    # --- model and optimizer ---
    model = make_model(model_cfg, cfg, data)
    scaler = make_scaler(model, cfg, p)
    forward = parallelize(model, p, cfg, scaler)
    optimizer, ema = make_optimizer(model, cfg, cfg.optimizer == "muon"), EMA(model, cfg.ema)
    learners, start, n_cut = {"": (model, optimizer, scaler)}, 0, 0  # captions cut by this process
    if cfg.resume:
        meta = load_state(cfg.out, learners, ema)
        start, n_cut = meta["step"], meta["n_cut"] if p.main else 0
    kind = "lm" if lm else "contrast" if contrast else "prior"
    config = {"kind": kind, "model": asdict(model.cfg), "data": asdict(data_cfg), "train": asdict(cfg)}
    if cfg.text_encoder:
        config["text_encoder"] = {"folder": str(Path(cfg.text_encoder).resolve()), "hash": data.text.hash}
    p.say(
        f"{len(data.train_set)} training and {len(data.val_set)} validation {'windows' if lm else 'pictures'}; "
        f"{data.text.n_vocab} text tokens; {model.cfg.text_len}+{model.cfg.n_image} positions; "
        f"{n_params(model) / 1e6:.2f} M parameters; {p}; from step {start} to {cfg.steps}"
    )

    # --- the loop ---
    batches = step_batches(data.train_set, cfg, p, start, data_cfg.workers, collate)
    log, step = Log(cfg.out, p.main, start), start
    for step, evaluating, saving, ending in steps(cfg, p, start):
        if evaluating:
            with ema.applied(model):
                values, sheet, prompts = evaluate(model, data.val_set, cfg, p), None, None
                check_finite(model, p, step, values)
                painter = unsharded(model, p)
                if p.main and kind == "prior":
                    sheet, prompts = draw_samples(painter, data, cfg, p.device)
            log.evaluation(step, values, ["image_loss", "text_loss", "grad_norm"], sheet, prompts=json.dumps(prompts))
            learned = [f"{k} {values[f'val_{k}_loss']:.3f}" for k in ("text", "image") if values[f"val_{k}_loss"]]
            p.say(f"\nstep {step}: val loss {', '.join(learned)} nats a token")
        if saving:
            check_finite(model, p, step)
            save_run(p, cfg.out, config, step, learners, ema, n_cut=int(p.sum([n_cut])[0]))
            if lm and p.main:
                save_lm(Path(cfg.out, "lm"), load_model(cfg.out, GPT(model.cfg)), data.text)
        if ending:
            break

        seed_step(cfg.seed, step, p.rank)
        parts = next(batches)
        n_cut += sum(part[-1] for part in parts)
        shown = hidden(model, parts, cfg, step, p)
        sums = gradients(forward, model, parts, shown, cfg, p, scaler)
        norm = optimizer_step(model, optimizer, scaler, cfg, step)
        ema.update(model, step)

        if (step + 1) % cfg.log_every == 0:
            text_loss, image_loss = p.sum(sums.tolist())
            values = {"loss": cfg.text_weight * text_loss + cfg.image_weight * image_loss}
            values |= {"text_loss": text_loss, "image_loss": image_loss}
            values |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
            work = cfg.log_every * cfg.batch_size * model.cfg.length
            log.write(step=step + 1, **values, tokens_per_s=log.rate(work))
    p.say(f"{cfg.out} holds step {step}; {data.skipped}; {int(p.sum([n_cut])[0])} captions were too long and were cut")


if __name__ == "__main__":
    run(main)
