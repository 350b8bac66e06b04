"""What a training of the prior will need: memory, arithmetic, time.  train_prior.py --plan N prints it for N processes."""

from dataclasses import replace
from pathlib import Path

import torch

from minit2i.attention import Layout
from minit2i.checkpoint import read_config
from minit2i.data import parse_size
from minit2i.gpt import GPT, check
from minit2i.lm import LM_SHAPE, in_shape, lm_text
from minit2i.masks import layer_masks
from minit2i.parallel import DTYPES
from minit2i.sample import load_vq
from minit2i.tokens import Text
from minit2i.train import pick_device, pick_precision


def parameters(cfg):
    """Parameters by part: blocks, embeddings (positions and the last norm included), heads."""
    with torch.device("meta"):
        model = GPT(replace(cfg, mask="auto"))  # a mask has no parameters
    parts = {"blocks": 0, "embeddings": 0, "heads": 0}
    for name, w in model.named_parameters():
        part = name.partition(".")[0]
        parts["blocks" if "blocks." in name else "heads" if part.endswith("head") else "embeddings"] += w.numel()
    return parts


def training_flops(cfg):
    """Floating-point operations to train on one sequence: 2 a weight and position forward, twice that backward.

    Attention is counted over the pairs that the masks show; nothing for recomputed activations.
    """
    with torch.device("meta"):
        model = GPT(replace(cfg, mask="auto", n_layer=1, n_encoder=min(1, cfg.n_encoder)))

    def matrices(module):
        return sum(w.numel() for w in module.parameters() if w.dim() == 2)

    block, length, t = model.blocks[0], cfg.sequence.length, cfg.text_len
    masks = layer_masks(cfg)
    pairs = sum(masks.count(name) * int(Layout(name, cfg.sequence).dense.sum()) for name in set(masks))
    work = cfg.n_layer * length * matrices(block)
    if cfg.n_encoder:
        memory = matrices(block.cross.kv)  # read at the text's positions
        work += cfg.n_layer * (t - length) * memory + cfg.n_encoder * t * matrices(model.encoder.blocks[0])
        pairs += cfg.n_layer * length * t + cfg.n_encoder * t * t
    heads = cfg.n_image * cfg.n_embd * cfg.n_codes + (t - 1) * cfg.n_embd * cfg.n_vocab * cfg.text_loss
    return 3 * 2 * (work + heads + 2 * cfg.n_embd * pairs)


def activation_bytes(cfg, precision):
    """Bytes that one block keeps for the backward pass, for one sequence.

    Counted on a CPU, on a narrow copy with a fused kernel's attention, as they grow with length times width.
    """
    small = replace(
        cfg, n_embd=128, n_head=2, n_vocab=8, n_codes=8, text_len=63, grid_h=24, grid_w=24, mask="full", dropout=0.0
    )  # 639 positions: no activation has as many elements as a matrix, which `pack` leaves out
    small = replace(small, objective="causal", order="text", low=0, n_states=0, n_kv_head=0)  # the same in each block
    small = replace(small, mlp_inner=cfg.mlp_inner * small.n_embd // cfg.n_embd)
    kept = []
    for n_layer in (1, 2):
        torch.manual_seed(0)
        model = GPT(replace(small, n_layer=n_layer))
        weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
        copies = {w.numel() for w in model.parameters()}  # autocast's, in half precision
        seen = {}  # tensors too, so that no other gets their place

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights and t.numel() not in copies:
                seen[storage.data_ptr()] = storage.nbytes(), t
            return t

        text, codes = torch.zeros(1, 63, dtype=torch.long), torch.zeros(1, 24 * 24, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                loss = sum(model(text, codes))
        kept.append(sum(n for n, _ in seen.values()))
        del loss
    return (kept[1] - kept[0]) / (small.length * small.n_embd) * cfg.length * cfg.n_embd


def plan(cfg, train_cfg, precision, world):
    """-> lines of text.  cfg must know its vocabularies and grid; train_cfg: train_prior.py's config."""
    parts, half = parameters(cfg), DTYPES[precision].itemsize
    total, shards = sum(parts.values()), world if train_cfg.strategy == "fsdp" else 1
    outside, block = parts["embeddings"] + parts["heads"], parts["blocks"] / (cfg.n_layer + cfg.n_encoder)
    sequences = train_cfg.batch_size / world / train_cfg.accum
    layer = activation_bytes(cfg, precision)
    if cfg.n_encoder:  # its blocks are shorter; a decoder block's share of the rest is taken as its own
        share = cfg.text_len / cfg.length * cfg.n_encoder / cfg.n_layer
        layer += activation_bytes(replace(cfg, n_encoder=0), precision) * share
    muon = train_cfg.optimizer == "muon"  # keeps one moment of a matrix, not two
    entering = cfg.length * cfg.n_embd * 4  # a float32 residual stream
    logits = 4 * (cfg.text_len * cfg.n_vocab * cfg.text_loss + cfg.n_image * cfg.n_codes)
    kept = cfg.n_layer * entering + layer if train_cfg.checkpoint_activations else cfg.n_layer * layer
    if shards > 1:
        copies = 4 * outside + 2 * half * block  # gathered: what is outside the blocks, and two of them
    else:
        copies = half * (parts["blocks"] + parts["heads"]) if half < 4 else 0  # autocast's
    memory = {
        "weights": 4 * total / shards,
        "gradients": 4 * total / (1 if train_cfg.accum > 1 else shards),  # whole between the parts of a batch
        "optimizer": (8 * total - 4 * parts["blocks"] * muon) / shards,
        "averages": 4 * total / shards if train_cfg.ema else 0,
        "copies of weights": copies,
        "activations": sequences * (kept + logits),
    }
    flops, tokens = training_flops(cfg), train_cfg.steps * train_cfg.batch_size * cfg.length
    seconds = flops / cfg.length * tokens / (world * train_cfg.peak_tflops * 1e12 * train_cfg.mfu)
    gib = 2.0**30
    return [
        f"{cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.n_head} heads, {cfg.text_len}+{cfg.n_image} positions, mask {cfg.mask}",
        f"parameters    {total / 1e6:12,.1f} M  (" + ", ".join(f"{k} {n / 1e6:,.1f}" for k, n in parts.items()) + ")",
        f"a process of {world} ({train_cfg.strategy}, {precision}, {sequences:g} sequences at a time"
        + (", checkpointed)" if train_cfg.checkpoint_activations else ")"),
        *(f"  {k:17} {v / gib:9.2f} GiB" for k, v in memory.items()),
        f"  {'all of these':17} {sum(memory.values()) / gib:9.2f} GiB",
        f"a token       {flops / cfg.length / 1e9:12,.2f} GFLOP (forward and backward)",
        f"{train_cfg.steps} steps of {train_cfg.batch_size}: {tokens / 1e9:,.3f} G tokens, {flops / cfg.length * tokens / 1e18:,.3f} EFLOP",
        f"  at {train_cfg.mfu:.0%} of {train_cfg.peak_tflops:g} TFLOP/s a process: {seconds / 86400:,.2f} days ({seconds / 3600:,.1f} hours)",
    ]


def say_plan(model_cfg, data_cfg, cfg):
    """Print --plan: with the tokenizer in --vq if there is one, else with the codes of a paper's size."""
    if cfg.plan < 0 or cfg.peak_tflops <= 0 or cfg.mfu <= 0:
        raise ValueError(
            f"--plan {cfg.plan}, --peak_tflops {cfg.peak_tflops:g}, --mfu {cfg.mfu:g}: each must be above 0"
        )
    n_vocab = model_cfg.n_vocab if cfg.init or cfg.resume else cfg.vocab_size
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
    check(model_cfg)
    precision = cfg.precision  # auto is this machine's
    precision = pick_precision("auto", pick_device(cfg.device)) if precision == "auto" else precision
    print("\n".join(plan(model_cfg, cfg, precision, cfg.plan)))
