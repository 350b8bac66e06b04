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

from minit2i.checkpoint import has_state, load_model, load_state, read_config, save_run, write_file
from minit2i.contrast import Contrast, evaluate_towers, fit_encoder
from minit2i.data import BadEntry, DataConfig, Skipped, StepSampler, grid_image, make_loader, parse_size, split
from minit2i.fp16 import make_scaler
from minit2i.gpt import GPT, SIZES, GPTConfig, fit_grid
from minit2i.lm import LM_SHAPE, in_shape, lm_text, load_lm, read_text, save_lm, text_windows
from minit2i.masked import hide_each
from minit2i.parallel import parallelize, sync_gradients, unsharded
from minit2i.plan import plan
from minit2i.sample import SampleConfig, draw_codes, file_hash, load_vq, shrink, write_captions
from minit2i.t5 import T5Text
from minit2i.tokens import CodeCache, Coded, Crops, Text
from minit2i.train import (
    EMA,
    Log,
    Processes,
    TrainConfig,
    autocast,
    make_optimizer,
    optimizer_step,
    parse_flags,
    pick,
    pick_device,
    pick_precision,
    plot_log,
    run,
    save_image,
    seed_step,
    steps,
)


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
    weight_decay: Annotated[float, "AdamW weight decay, on matrices only"] = 0.045
    ema: Annotated[float, "decay of the averaged weights, which are the ones saved; 0: none"] = 0.999

    @property
    def named(self):
        return SIZES.get(self.model_size, {})


def collate(samples):
    """[(ids, codes, low, cut)] -> text (B, T), codes (B, N), low-resolution codes (B, M), number of captions cut."""
    text, codes, low, cut = zip(*samples)
    return torch.stack(text), torch.stack(codes), torch.stack(low), sum(cut)


def train_text(source, indices, vocab_size, most=50_000):
    """A SentencePiece model on at most `most` entries' captions, evenly spaced over the training set."""

    def captions():
        for i in indices[:: -(-len(indices) // most)]:
            try:
                yield from source.captions(int(i))
            except BadEntry:
                pass

    return Text.train(captions(), vocab_size)


def all_captions(*sets):
    """The captions of sets (source, indices), as far as they can be read."""
    captions = []
    for source, indices in sets:
        for i in indices:
            try:
                captions += source.captions(int(i))
            except BadEntry:
                pass
    return captions


def read_captions(out, cfg, length, sets, p, precision):
    """What turns captions into text ids or, with --text_encoder, into states that are in the cache from now on."""
    if not cfg.text_encoder:
        return Text((out / "text.model").read_bytes(), length)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    text = T5Text(cfg.text_encoder, length, p.device, dtype)
    text.remember(all_captions(*sets), cfg.cache, p)
    return text


def code_cache(crops, cfg, vq, vq_hash, p, precision, low=0):
    """The codes of a set's crops, shrunk low times if not 0, encoded now if they are not in the cache yet."""
    folder = Path(cfg.cache, f"codes-{vq_hash}-{crops.digest()}" + (f"-low{low}" if low else ""))
    if any(p.gather(not folder.exists())):
        height, width = (s // max(1, low) for s in crops.pictures.size)

        def encode(images):
            with autocast(p.device, precision):
                return vq.encode(shrink(images.to(p.device), low) if low else images.to(p.device))

        CodeCache.build(folder, crops, encode, vq.grid(height, width), vq.cfg.n_codes, p)
    return CodeCache(folder)


@torch.no_grad()
def evaluate(model, coded, n, batch, p, precision):
    """First n validation pictures -> text and image loss per token, in nats; a masked model's over fixed masks."""
    sums = [0.0, 0, 0.0, 0]
    mine = list(range(min(n, len(coded))))[p.rank :: p.world]
    for first in range(0, -(-min(n, len(coded)) // p.world), batch):
        some = mine[first : first + batch]
        rows = some or [0]  # a sharded model needs all processes in every pass
        text, codes, low, _ = collate([coded[i] for i in rows])
        shown, n_image = None, codes.numel()
        if model.masked:
            shown = hide_each(codes, rows)
            n_image = int((shown < 0).sum())
        with autocast(p.device, precision):
            text_loss, image_loss = model(*(x if x is None else x.to(p.device) for x in (text, codes, low, shown)))
        if some:
            n_text = int(model.n_text_targets(text))
            sums = [a + float(b) for a, b in zip(sums, (text_loss, n_text, image_loss, n_image))]
    sums = p.sum(sums)
    return sums[0] / max(1, sums[1]), sums[2] / sums[3]


def draw_samples(model, vq, text, prompts, some, cfg, device):
    """Two pictures for each of some validation captions, as one sheet, a column a caption -> sheet, captions.

    some: the validation samples of the prompts, collated.  A captioner is shown their pictures instead, and the
    captions are its own.
    """
    ids, codes, low, _ = (x.to(device) if torch.is_tensor(x) else x for x in some)
    grid, settings = (model.cfg.grid_h, model.cfg.grid_w), SampleConfig(n=2, seed=cfg.seed)
    if model.cfg.order == "image":
        settings = replace(settings, n=1, temperature=0.0)
        ids = write_captions(model, codes, text.sp.bos_id(), text.sp.eos_id(), settings)
        return grid_image(vq.decode(codes.view(-1, *grid)), len(codes)), [text.decode(row) for row in ids]
    low = low.repeat_interleave(2, 0) if low.shape[1] else None
    codes = draw_codes(model, ids, text.encode("").to(device), settings, None, low)
    images = vq.decode(codes.view(-1, *grid))
    return grid_image(images.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1), len(prompts)), prompts


def say_plan(model_cfg, data_cfg, cfg):
    """Print --plan: with the tokenizer in --vq if there is one, else with the codes of a paper's size."""
    if cfg.plan < 0 or cfg.peak_tflops <= 0 or cfg.mfu <= 0:
        raise ValueError(
            f"--plan {cfg.plan}, --peak_tflops {cfg.peak_tflops:g}, --mfu {cfg.mfu:g}: each must be above 0"
        )
    n_vocab = cfg.vocab_size
    if cfg.init_lm:
        model_cfg = in_shape(model_cfg, cfg.init_lm)
        n_vocab = Text(lm_text(cfg.init_lm), model_cfg.text_len).n_vocab
    if cfg.text_encoder:
        model_cfg, n_vocab = replace(model_cfg, n_vocab=0, n_states=read_config(cfg.text_encoder)["d_model"]), 0
    if model_cfg.objective == "text":
        model_cfg = replace(model_cfg, **LM_SHAPE, n_codes=1, grid_h=1, grid_w=1, n_vocab=n_vocab)
    elif Path(cfg.vq, "config.json").exists():
        vq, size = load_vq(cfg.vq), data_cfg.size or read_config(cfg.vq)["data"]["size"]
        grid_h, grid_w = vq.grid(*parse_size(size))
        model_cfg = replace(model_cfg, n_codes=vq.cfg.n_codes, grid_h=grid_h, grid_w=grid_w, n_vocab=n_vocab)
    elif model_cfg.n_codes:
        model_cfg = replace(model_cfg, n_vocab=n_vocab if cfg.init_lm or cfg.text_encoder else model_cfg.n_vocab)
    else:
        raise ValueError(
            f"--plan needs a tokenizer, and {cfg.vq} holds none; name one with --vq, or a paper's --model_size"
        )
    precision = pick_precision(cfg.precision, pick_device(cfg.device))
    print("\n".join(plan(model_cfg, cfg, precision, cfg.plan)))


def find_tokenizer(cfg, out, resumed, device):
    """The tokenizer that the run is about -> VQ, its folder, its hash.  ValueError if --init knows another one's codes."""
    folder = out / "vq" if resumed else Path(cfg.vq)
    vq, vq_hash = load_vq(folder, device), file_hash(folder / "model.safetensors")
    if cfg.init and not resumed and file_hash(Path(cfg.init, "vq", "model.safetensors")) != vq_hash:
        theirs = Path(cfg.init, "vq")
        raise ValueError(f"{cfg.init} was trained on the codes of another tokenizer than {cfg.vq}; use --vq {theirs}")
    return vq, folder, vq_hash


def keep_inputs(out, cfg, vq_folder, source, indices):
    """What a new run has a copy of: the tokenizer and, unless T5 reads the captions, a text model, trained now if need be."""
    for name in ("config.json", "model.safetensors"):
        write_file(out / "vq" / name, Path(vq_folder, name).read_bytes())
    if cfg.init_lm:
        write_file(out / "text.model", lm_text(cfg.init_lm))
    elif cfg.init and not cfg.text_encoder:
        write_file(out / "text.model", Path(cfg.init, "text.model").read_bytes())
    elif not cfg.text_encoder:
        write_file(out / "text.model", train_text(source, indices, cfg.vocab_size))


def load_data(sets, text, model_cfg, data_cfg, cfg, vq, vq_hash, p, precision):
    """Pictures -> codes, once -> training set, validation set, captions of its first pictures, Skipped."""

    def cache(crops, low=0):
        return code_cache(crops, cfg, vq, vq_hash, p, precision, low)

    (source, train), (val_source, val) = sets
    train_crops, val_crops = Crops(source, train, data_cfg, cfg.crops, cfg.seed), Crops(val_source, val, data_cfg)
    train_cache, val_cache = cache(train_crops), cache(val_crops)
    if not val_cache.ok.any():  # a few pictures, and the one kept for validation is bad
        val_source, val, val_crops, val_cache = source, train, train_crops, train_cache
    skipped = Skipped(p.say)
    skipped.add([*source.damaged, *train_cache.skipped, *val_cache.skipped])
    p.say(str(skipped))
    train_low, val_low = (cache(crops, model_cfg.low) if model_cfg.low else None for crops in (train_crops, val_crops))
    train_set = Coded(source, train, train_cache, text, cfg.seed, cfg.bpe_dropout, cfg.cond_drop, train_low)
    val_set = Coded(val_source, val, val_cache, text, low=val_low)
    return train_set, val_set, [val_source.captions(int(val[row]))[0] for row in val_set.rows[:8]], skipped


def load_text(model_cfg, data_cfg, cfg, p, out, resumed):
    """--objective text: the plain text file --data -> its text model, training and validation windows."""
    if cfg.init or cfg.text_encoder or model_cfg.n_encoder or model_cfg.order == "image":
        raise ValueError(
            "--objective text trains words alone; leave out --init, --text_encoder, --n_encoder and --order image"
        )
    paragraphs = read_text(data_cfg.data)
    if p.main and not resumed:
        write_file(out / "text.model", lm_text(cfg.init_lm) if cfg.init_lm else Text.train(paragraphs, cfg.vocab_size))
    p.barrier()
    text = Text((out / "text.model").read_bytes(), model_cfg.text_len)
    return text, *text_windows(paragraphs, text, data_cfg.val_fraction, cfg.seed)


def make_model(model_cfg, cfg, text, n_codes, grid, out, resumed):
    """The model as it starts, from chance, --init or --init_lm.  ValueError if it is not what a resumed run has trained."""
    torch.manual_seed(cfg.seed)
    model_cfg = replace(model_cfg, n_vocab=text.n_vocab, n_codes=n_codes, grid_h=grid[0], grid_w=grid[1])
    if cfg.text_encoder:
        model_cfg = replace(model_cfg, n_states=text.width)
    if cfg.init or resumed:
        before = read_config(out if resumed else cfg.init)
        if before.get("text_encoder", {}).get("hash") != (text.hash if cfg.text_encoder else None):
            raise ValueError(
                "--init and --resume cannot change what reads the captions of "
                f"{out if resumed else cfg.init} (text_encoder in its config.json); use another --text_encoder"
            )
    if resumed:
        if model_cfg != pick(GPTConfig, before["model"]):
            raise ValueError(f"--resume cannot change the code grid of {out}; use another --out")
        if cfg.block_scale != before["train"].get("block_scale", False):
            raise ValueError(
                f"--resume cannot change --block_scale: the scales of {out} would be lost; use another --out"
            )
    contrast = model_cfg.objective == "contrast"
    model = (Contrast if contrast else GPT)(model_cfg)
    if not (model.masked or contrast):
        model.check_causal()
    if model.text_ahead and cfg.text_weight and model_cfg.text_loss:
        raise ValueError(f"mask {model_cfg.mask} shows text what it should predict: it needs --text_weight 0")
    if cfg.init and not resumed:
        towers = read_config(cfg.init)["kind"] == "contrast" and not contrast
        load_model(cfg.init, model, fit_encoder if towers else fit_grid).train()
    if cfg.init_lm and cfg.init_lm_weights and not resumed:
        load_lm(cfg.init_lm, model)
    return model


def check_contrast(model_cfg, cfg):
    """ValueError for flags that two towers have no use for."""
    if cfg.accum > 1 or cfg.strategy != "ddp" or cfg.block_scale:
        raise ValueError(
            "--objective contrast compares the whole batch at once, in replicas: use --accum 1, --strategy ddp and "
            "--no-block_scale, with --checkpoint_activations if memory is short"
        )
    if cfg.text_encoder or cfg.init_lm or cfg.init and read_config(cfg.init)["kind"] != "contrast":
        raise ValueError("--objective contrast starts from chance, or with --init from its like; leave out the others")


def check_flags(model_cfg, data_cfg, cfg):
    """ValueError for flags that do not go together."""
    if not data_cfg.captions:
        raise ValueError("--no-captions is for train_vq.py: the prior needs captions")
    if data_cfg.flip and cfg.crops == 1:
        raise ValueError("--flip needs --crops 2 or more: the one central crop is never mirrored")
    if cfg.init_lm and (cfg.init or cfg.text_encoder):
        raise ValueError("--init_lm brings words and weights of its own; leave out --init and --text_encoder")
    if model_cfg.n_states and not cfg.text_encoder:
        raise ValueError("a frozen T5 read this prior's captions: name its folder with --text_encoder")
    if model_cfg.objective == "contrast":
        check_contrast(model_cfg, cfg)


def hidden(model, parts, cfg, step, p):
    """What a masked prior or the two towers are shown of each part of a batch; None for a model that sees all."""
    if model.cfg.objective == "contrast":
        return [model.hide(text) for text, *_ in parts]
    if not model.masked:
        return [None] * len(parts)
    size = len(parts[0][0])  # by the sample's place in the run, whichever process has it
    first = cfg.seed * 1_000_003 + step * cfg.batch_size + p.rank * cfg.accum * size
    return [hide_each(part[1], range(first + k * size, first + (k + 1) * size)) for k, part in enumerate(parts)]


def gradients(forward, model, parts, shown, cfg, p, precision, scaler):
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
        with autocast(p.device, precision):
            batch = (x if x is None else x.to(p.device) for x in (*batch, shown[k]))
            text_loss, image_loss = forward(*batch, cfg.label_smoothing if model.masked else 0.0)
        loss = cfg.text_weight * text_loss / n_text + cfg.image_weight * image_loss / n_image
        scaler.scale(loss * p.world).backward()  # x world: it takes the mean, and these are parts of a sum
        sums += torch.stack([text_loss.detach() / n_text, image_loss.detach() / n_image])
    return sums


def main():
    # --- configuration, processes, tokenizer ---
    model_cfg, data_cfg, cfg = parse_flags(__doc__, GPTConfig, DataConfig, PriorTrainConfig)
    lm, contrast = (model_cfg.objective == name for name in ("text", "contrast"))
    if cfg.plan and contrast:
        raise ValueError("--plan counts priors, not the towers of --objective contrast")
    if cfg.plan:
        return say_plan(model_cfg, data_cfg, cfg)
    check_flags(model_cfg, data_cfg, cfg)
    if contrast:  # each caption counts: none is dropped
        cfg = replace(cfg, cond_drop=0.0)
    p = Processes(cfg.device)
    precision = pick_precision(cfg.precision, p.device)
    out, resumed = Path(cfg.out), cfg.resume and has_state(cfg.out)
    if cfg.init_lm and not resumed:
        model_cfg = in_shape(model_cfg, cfg.init_lm)

    # --- data: captions -> text model, pictures -> codes, once; or a text file ---
    if lm:  # beside the words one code, of one kind: its loss is 0
        model_cfg, cfg = replace(model_cfg, **LM_SHAPE), replace(cfg, text_weight=1.0, image_weight=0.0)
        n_codes, grid, skipped = 1, (1, 1), "no pictures"
        text, train_set, val_set = load_text(model_cfg, data_cfg, cfg, p, out, resumed)
    else:
        vq, vq_folder, vq_hash = find_tokenizer(cfg, out, resumed, p.device)
        data_cfg = replace(data_cfg, size=data_cfg.size or read_config(vq_folder)["data"]["size"])
        n_codes, grid = vq.cfg.n_codes, vq.grid(*parse_size(data_cfg.size))
        sets = split(data_cfg)
        if p.main and not resumed:
            keep_inputs(out, cfg, vq_folder, *sets[0])
        p.barrier()
        text = read_captions(out, cfg, model_cfg.text_len, sets, p, precision)
        train_set, val_set, prompts, skipped = load_data(
            sets, text, model_cfg, data_cfg, cfg, vq, vq_hash, p, precision
        )
        shown_samples = collate([val_set[i] for i in range(len(prompts))])

    # --- model and optimizer ---
    model = make_model(model_cfg, cfg, text, n_codes, grid, out, resumed)
    model_cfg, n_params = model.cfg, sum(w.numel() for w in model.parameters())
    scaler = make_scaler(model, cfg, p, precision)
    forward = parallelize(model, p, cfg, precision, scaler)
    optimizer, ema = make_optimizer(model, cfg), EMA(model, cfg.ema)
    start, cut, earlier_cut = 0, 0, 0  # captions cut by this process, and before resuming
    if resumed:
        meta = load_state(out, model, ema, optimizer, scaler)
        start, earlier_cut = meta["step"], meta["n_cut"]
    config = {
        "kind": "lm" if lm else "contrast" if contrast else "prior",
        "model": asdict(model_cfg),
        "data": asdict(data_cfg),
        "train": asdict(cfg),
    }
    if cfg.text_encoder:
        config["text_encoder"] = {"folder": str(Path(cfg.text_encoder).resolve()), "hash": text.hash}
    p.say(
        f"{len(train_set)} training and {len(val_set)} validation {'windows' if lm else 'pictures'}; {text.n_vocab} text tokens; "
        f"{model_cfg.text_len}+{model_cfg.n_image} positions; {n_params / 1e6:.2f} M parameters; {precision} on "
        f"{p.world} x {p.device.type}; from step {start} to {cfg.steps}"
    )
    step, all_cut, part_size = start, earlier_cut, cfg.batch_size // (cfg.accum * p.world)

    # --- the loop ---
    sampler = StepSampler(start, cfg.steps, cfg.batch_size, cfg.accum, p.rank, p.world)
    loader = iter(make_loader(train_set, sampler, data_cfg.workers, collate))
    log = Log(out, p.main, start)
    for step, evaluating, saving, ending in steps(cfg, p, start, resumed):
        if evaluating:
            with ema.applied(model):
                found = {}
                if contrast:
                    some = [val_set[i][:2] for i in range(min(cfg.eval_size, len(val_set)))]
                    val_text, val_image, found["val_retrieval"] = evaluate_towers(model, some)
                else:
                    val_text, val_image = evaluate(model, val_set, cfg.eval_size, part_size, p, precision)
                painter = unsharded(model, p)
                if p.main and not (lm or contrast):
                    sheet, captions = draw_samples(painter, vq, text, prompts, shown_samples, cfg, p.device)
                    save_image(out / f"samples-{step:06d}.png", sheet, prompts=json.dumps(captions))
            log.write(step=step, val_text_loss=val_text, val_image_loss=val_image, **found)
            learned = [f"{k} {v:.3f}" for k, v in (("text", val_text), ("image", val_image)) if v]
            p.say(f"\nstep {step}: val loss {', '.join(learned)} nats a token")
            if p.main:
                plot_log(out, ["image_loss", "text_loss", "grad_norm"])
            log.rate(0)
        if saving:
            all_cut = earlier_cut + int(p.sum([cut])[0])
            save_run(p, out, config, step, model, ema, optimizer, scaler, n_cut=all_cut)
            if lm:
                with ema.applied(model):
                    whole = unsharded(model, p)
                    if p.main:
                        save_lm(out / "lm", whole, text)
        if ending:
            break

        seed_step(cfg.seed, step, p.rank)
        parts = [next(loader) for _ in range(cfg.accum)]
        cut += sum(part[-1] for part in parts)
        shown = hidden(model, parts, cfg, step, p)
        sums = gradients(forward, model, parts, shown, cfg, p, precision, scaler)
        norm = optimizer_step(model, optimizer, scaler, cfg, step)
        ema.update(model, step)

        if (step + 1) % cfg.log_every == 0:
            text_loss, image_loss = p.sum(sums.tolist())
            log.write(
                step=step + 1,
                loss=cfg.text_weight * text_loss + cfg.image_weight * image_loss,
                text_loss=text_loss,
                image_loss=image_loss,
                grad_norm=float(norm),
                lr=optimizer.param_groups[0]["lr"],
                tokens_per_s=log.rate(cfg.log_every * cfg.batch_size * model_cfg.length),
            )
    p.say(f"{out} holds step {step}; {skipped}; {all_cut} captions were too long and were cut")


if __name__ == "__main__":
    run(main)
