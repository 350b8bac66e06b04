"""What training a prior will need: memory, arithmetic, time.  Computed, not measured.

python -m minit2i.experiments.plan --model_size dalle-12b --processes 512 --precision fp16 --strategy fsdp \\
    --batch_size 1024 --steps 430000 --checkpoint_activations
python -m minit2i.experiments.plan --vq out/vq --n_layer 12 --n_embd 768 --n_head 12 --processes 8

The flags are train_prior.py's, and those of the machine.  The code grid is the tokenizer's in --vq if there is one,
else the named size's.  With --compile activations and logits are those that compiled blocks and losses keep.

Shapes: T text length, N codes, L = P+N sequence length.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch

from minit2i.attention import layer_masks
from minit2i.checkpoint import load_vq, read_config
from minit2i.config import Settings, above, at_least, between, pick
from minit2i.data import parse_size
from minit2i.flags import add_flags, named, new_parser
from minit2i.gpt import CONDITIONS, GPT, MODELS, GPTConfig, build_prior, prior_config, reads_captions, with_codes
from minit2i.papers import RECIPES, SIZES
from minit2i.papers.parti import Encoder
from minit2i.parallel import blocks
from minit2i.tokens import Text
from minit2i.train import DTYPES, pick_device, pick_precision, run


@dataclass(frozen=True)
class PlanConfig(Settings):
    """The training and the machine, with the names of train_prior.py's flags."""

    group = "Plan"
    processes: Annotated[int, "number of processes (GPUs)", at_least(1)] = 1
    peak_tflops: Annotated[float, "peak TFLOP/s of a process, without sparsity (A100: 312)", above(0)] = 312.0
    mfu: Annotated[float, "fraction of the peak that training reaches", between(0, 1, open=True)] = 0.4
    recipe: Annotated[str, "a paper's settings as defaults"] = ""
    model_size: Annotated[str, "a named size"] = ""
    vq: Annotated[str, "folder of the tokenizer"] = "out/vq"
    image_size: Annotated[str, "64, or HEIGHTxWIDTH; empty: the tokenizer's"] = ""
    vocab_size: Annotated[int, "tokens of the text model", at_least(1)] = 2048
    steps: Annotated[int, "optimizer steps", at_least(0)] = 10000
    batch_size: Annotated[int, "images per step over all processes", at_least(1)] = 32
    accum: Annotated[int, "gradient-accumulation steps", at_least(1)] = 1
    precision: Annotated[str, "auto is this machine's", ("auto", *DTYPES)] = "auto"
    strategy: Annotated[str, "replicas, shards, or shards within a node", ("ddp", "fsdp", "hsdp")] = "ddp"
    per_node: Annotated[int, "processes of a node, for hsdp", at_least(1)] = 8
    compile: Annotated[bool, "torch.compile the model"] = False
    checkpoint_activations: Annotated[bool, "recompute activations in the backward pass"] = False
    optimizer: Annotated[str, "adamw or muon", ("adamw", "muon")] = "adamw"
    ema: Annotated[float, "decay of the averaged weights; 0: none", between(0, 1)] = 0.999

    def __post_init__(self):
        super().__post_init__()
        parts = self.processes * self.accum
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {parts} micro-batches (processes x accum); "
                f"use {self.batch_size // parts * parts + parts}"
            )


# --- counting ----------------------------------------------------------------------------------------


@lru_cache(8)
def meta_prior(cfg, **changes):
    """A prior without memory for its weights."""
    with torch.device("meta"):
        return build_prior(asdict(cfg) | changes)


def parameters(cfg):
    """Number of parameters by part: blocks, embeddings (positions and last norm included), heads."""
    parts = {"blocks": 0, "embeddings": 0, "heads": 0}
    for name, w in meta_prior(cfg).named_parameters():
        head = name.partition(".")[0].endswith("head")
        parts["blocks" if "blocks." in name else "heads" if head else "embeddings"] += w.numel()
    return parts


def matrices(module):
    """Number of weights in a module's matrices."""
    return sum(w.numel() for w in module.parameters() if w.dim() == 2)


def encoders(cfg):
    """The trained encoders that the conditions have: [(a block, number of blocks, positions)]."""
    found = (m for m in meta_prior(cfg).conditions.modules() if isinstance(m, Encoder))
    return [(m.blocks[0], len(m.blocks), m.mask.layout.length) for m in found]


def training_flops(cfg):
    """Floating-point operations to train on one sequence: 2 per weight and position forward, twice that backward.

    Attention counts the pairs that the masks show; recomputed activations are not counted.
    """
    model = meta_prior(cfg, n_layer=1)
    block, length, memory, t = model.blocks[0], model.layout.length, model.memory_length, cfg.text_len
    masks = layer_masks(cfg.mask, cfg.n_layer)
    visible = {name: int(meta_mask.dense.sum()) for name, meta_mask in meta_prior(cfg).attention_masks.items()}
    pairs = sum(visible[name] for name in masks) + cfg.n_layer * length * memory
    work = cfg.n_layer * length * matrices(block)
    if memory:  # keys and values are computed at the memory's positions instead
        work += cfg.n_layer * (memory - length) * matrices(block.cross.f.kv)
    for layer, n, positions in encoders(cfg):
        work, pairs = work + n * positions * matrices(layer), pairs + n * positions**2
    heads = cfg.n_image * cfg.n_embd * cfg.n_codes + (t - 1) * cfg.n_embd * cfg.n_vocab * model.predicts_text
    return 3 * 2 * (work + heads + 2 * cfg.n_embd * pairs)


def activation_bytes(cfg, precision, cross, compiled=False):
    """Bytes that one block (cross: with cross-attention) keeps for the backward pass, for one sequence.

    Counted on a CPU, on a narrow copy with a fused kernel's attention, and scaled by length times width.  compiled: of
    a graph that Inductor's partition divides into forward and backward pass, run without Inductor.
    """
    narrow = dict(model="gpt", n_embd=128, n_head=2, n_vocab=8, n_codes=8, text_len=63, grid_h=24, grid_w=24)
    narrow |= dict(mask="causal", dropout=0.0, n_kv_head=0, mlp_inner=cfg.mlp_inner * 128 // cfg.n_embd)
    narrow |= dict(condition="encoder", n_encoder=1) if cross else dict(condition="text")
    kept = []  # 639 positions: no activation has as many elements as a matrix, which `pack` leaves out
    for n_layer in (1, 2):
        torch.manual_seed(0)
        model = build_prior(asdict(cfg) | narrow | {"n_layer": n_layer})
        if compiled:
            torch._dynamo.reset()  # earlier graphs count towards its limit, beyond which nothing is compiled
            for block in blocks(model):
                block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
        weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
        copies = {w.numel() for w in model.parameters()}  # autocast's, in half precision
        seen = {}  # tensors too, so that their addresses are not reused

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights and t.numel() not in copies:
                seen[storage.data_ptr()] = storage.nbytes(), t
            return t

        batch = {"text": torch.zeros(1, 63, dtype=torch.long), "codes": torch.zeros(1, 24 * 24, dtype=torch.long)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                loss = sum(model.loss(batch).values())
        kept.append(sum(n for n, _ in seen.values()))
        del loss
    length = meta_prior(cfg).layout.length
    return (kept[1] - kept[0]) / (model.layout.length * 128) * length * cfg.n_embd


def memory_by_part(cfg, how, precision):
    """{part: bytes} of one process."""
    model, parts, half = meta_prior(cfg), parameters(cfg), DTYPES[precision].itemsize
    stacks, length, total = encoders(cfg), model.layout.length, sum(parts.values())
    shards = {"ddp": 1, "fsdp": how.processes, "hsdp": min(how.per_node, how.processes)}[how.strategy]
    outside, block = (
        parts["embeddings"] + parts["heads"],
        parts["blocks"] / (cfg.n_layer + sum(n for _, n, _ in stacks)),
    )
    sequences = how.batch_size / how.processes / how.accum
    layer = activation_bytes(cfg, precision, model.memory_length > 0, how.compile)
    if stacks:  # an encoder's are shorter and have no cross-attention
        shorter = sum(n * positions for _, n, positions in stacks) / length
        layer += activation_bytes(cfg, precision, False, how.compile) * shorter / cfg.n_layer
    entering = length * cfg.n_embd * 4  # a float32 residual stream
    heads = cfg.text_len * cfg.n_vocab * model.predicts_text, cfg.n_image * cfg.n_codes
    if how.compile:  # logits are kept in the product's precision, and their gradient takes their place
        logits = (4 if cfg.fp32_logits else half) * sum(heads)
    else:  # both log-softmaxes are kept; the backward pass adds two gradients of one head's logits at a time
        logits = 4 * sum(heads) + 8 * max(heads)
    kept = cfg.n_layer * entering + layer if how.checkpoint_activations else cfg.n_layer * layer
    if shards > 1:
        copies = 4 * outside + 2 * half * block  # gathered: everything outside the blocks, and two blocks
    else:
        copies = half * (parts["blocks"] + parts["heads"]) if half < 4 else 0  # autocast's
    muon = how.optimizer == "muon"  # keeps one moment of a matrix, not two
    return {
        "weights": 4 * total / shards,
        "gradients": 4 * total / (1 if how.accum > 1 else shards),  # whole between accumulation steps
        "optimizer": (8 * total - 4 * parts["blocks"] * muon) / shards,
        "averages": 4 * total / shards if how.ema else 0,
        "copies of weights": copies,
        "activations": sequences * (kept + logits),
    }


def plan(cfg, how, precision):
    """-> lines of text.  cfg: the prior's config with its vocabularies and grid; how: PlanConfig."""
    parts, memory, length = parameters(cfg), memory_by_part(cfg, how, precision), meta_prior(cfg).layout.length
    total, sequences = sum(parts.values()), how.batch_size / how.processes / how.accum
    flops, tokens, gib = training_flops(cfg), how.steps * how.batch_size * length, 2.0**30
    total_flops = flops / length * tokens
    days = total_flops / (how.processes * how.peak_tflops * 1e12 * how.mfu) / 86400
    way = f"{how.strategy}, {precision}" + ", compiled" * how.compile + ", checkpointed" * how.checkpoint_activations
    shape = f"{cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.n_head} heads"
    return [
        f"{shape}, {length - cfg.n_image}+{cfg.n_image} positions, mask {cfg.mask}",
        f"parameters    {total / 1e6:12,.1f} M  (" + ", ".join(f"{k} {n / 1e6:,.1f}" for k, n in parts.items()) + ")",
        f"a process of {how.processes} ({way}, {sequences:g} sequences at a time)",
        *(f"  {k:17} {v / gib:9.2f} GiB" for k, v in memory.items()),
        f"  {'all of these':17} {sum(memory.values()) / gib:9.2f} GiB",
        f"a token       {flops / length / 1e9:12,.2f} GFLOP (forward and backward)",
        f"{how.steps} steps of {how.batch_size}: {tokens / 1e9:,.3f} G tokens, {total_flops / 1e18:,.3f} EFLOP",
        f"  at {how.mfu:.0%} of {how.peak_tflops:g} TFLOP/s a process: {days:,.2f} days ({24 * days:,.1f} hours)",
    ]


def planned(argv=None):
    """argv -> the prior's config, PlanConfig.  ValueError without a tokenizer or a named size."""
    parser = new_parser(__doc__, argument_default=argparse.SUPPRESS)
    parts = [part.Config for part in (*MODELS.values(), *CONDITIONS.values()) if part.Config]
    add_flags(parser, PlanConfig, GPTConfig, *dict.fromkeys(parts))
    given = vars(parser.parse_args(argv))
    recipe = named("recipe", given.get("recipe", ""), RECIPES).get("prior", {})
    size = named("model_size", given.get("model_size", recipe.get("model_size", "")), SIZES)
    settings = recipe | size | given
    how = pick(PlanConfig, settings)
    model, cfg = prior_config({k: v for k, v in settings.items() if k != "n_vocab"})
    if not issubclass(model, GPT):
        raise ValueError(f"a plan is for priors, not for --model {cfg.model}")
    if Path(how.vq, "config.json").exists():
        vq, size = load_vq(how.vq), how.image_size or read_config(how.vq)["data"]["image_size"]
        cfg = with_codes(cfg, vq, vq.grid(*parse_size(size)))
    elif not cfg.n_codes and not model.data:  # a language model has no codes
        raise ValueError(f"a plan needs a tokenizer, and {how.vq} holds none; use --vq, or a paper's --model_size")
    words, n_vocab = model.vocabulary(cfg), settings.get("n_vocab", how.vocab_size)
    if words:
        n_vocab = Text(words, cfg.text_len).n_vocab
    elif reads_captions(cfg):
        n_vocab = 0
    return replace(cfg, n_vocab=n_vocab), how


def main():
    cfg, how = planned()
    device = pick_device("auto")
    print("\n".join(plan(cfg, how, pick_precision(how.precision, device))))


if __name__ == "__main__":
    run(main)
