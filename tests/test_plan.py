"""Named sizes against the papers, and plans against what can be counted."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from priors import COARSE
from torch.utils.flop_counter import FlopCounterMode

from minit2i import gpt
from minit2i.checkpoint import save_model
from minit2i.experiments import bench, masks
from minit2i.experiments.plan import PlanConfig, activation_bytes, main, memory_by_part, parameters, plan, planned
from minit2i.experiments.plan import training_flops
from minit2i.gpt import build_prior, prior_config
from minit2i.papers import RECIPES, SIZES
from minit2i.papers.lm import SHAPE, save_llama
from minit2i.tokens import Text
from minit2i.vq import build_vq

SMALL = dict(n_layer=2, n_head=2, n_embd=32, text_len=5, n_vocab=11, n_codes=7, grid_h=3, grid_w=4)


def config(**settings):
    return prior_config(SMALL | settings)[1]


def batch(cfg):
    return {
        "text": torch.zeros(1, cfg.text_len, dtype=torch.long),
        "codes": torch.zeros(1, cfg.n_image, dtype=torch.long),
    }


def test_papers_sizes_have_the_papers_parameters():
    """Within 2 %: CogView (4 B), and DALL-E without heads (12 B; with them it is 2.4 % above the rounded figure)."""
    dalle, cogview = (parameters(prior_config(SIZES[name])[1]) for name in ("dalle-12b", "cogview-4b"))
    assert abs(dalle["blocks"] + dalle["embeddings"] - 12e9) < 0.02 * 12e9
    assert abs(sum(cogview.values()) - 4e9) < 0.02 * 4e9
    for name, paper in (("350m", 350e6), ("750m", 750e6), ("3b", 3e9), ("20b", 20e9)):  # blocks only, 0.7 to 2 % above
        assert abs(parameters(prior_config(SIZES[f"parti-{name}"])[1])["blocks"] - paper) < 0.021 * paper


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_model(name):
    settings = {"n_vocab": 50, "n_codes": 20} | SIZES[name] | {"n_layer": 3, "grid_h": 4, "grid_w": 4, "text_len": 8}
    cfg = prior_config(settings | {"n_embd": 4 * settings["n_head"]})[1]
    assert all(loss.isfinite() for loss in build_prior(asdict(cfg)).loss(batch(cfg)).values())


def test_flops_are_those_that_run():
    """In float64, which takes no fused kernel: its backward pass would compute the scores once more."""
    for more in ({"model": "masked"}, {"condition": "encoder", "n_encoder": 3, "mask": "causal"}):
        cfg = config(**more)
        model = build_prior(asdict(cfg)).double()
        model.attention_masks["causal"] = gpt.AttentionMask("bidirectional", model.layout)  # counted in full
        model.codes_ahead = False
        with FlopCounterMode(display=False) as counter:
            sum(logits.sum() for logits in model.logits(batch(cfg)) if logits is not None).backward()
        full = replace(cfg, mask="bidirectional")
        assert counter.get_total_flops() == training_flops(full), more
    row, causal = (training_flops(config(mask=mask)) for mask in ("row", "causal"))
    assert row < causal < training_flops(config(mask="bidirectional"))


def test_text_logits_count():
    cfg = config()
    extra = 6 * (cfg.text_len - 1) * cfg.n_embd * cfg.n_vocab
    masked = training_flops(config(model="masked"))
    assert training_flops(config(mask="bidirectional")) - masked == extra


@pytest.mark.parametrize(
    "change", [{}, {"mlp": "gelu", "norm": "layernorm", "qk_norm": False, "sandwich": True}], ids=str
)
def test_activations_are_those_that_are_kept(change):
    cfg = config(grid_h=20, grid_w=30, n_embd=96, **change)
    kept = []
    for n_layer in (1, 2):
        model, seen = build_prior(asdict(cfg) | {"n_layer": n_layer}), {}
        own = {w.untyped_storage().data_ptr() for w in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(id(t.untyped_storage()), t), lambda t: t
        ):
            loss = sum(model.loss(batch(cfg)).values())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen.values()}
        kept.append(sum(n for ptr, n in storages.items() if ptr not in own))
        del loss
    assert abs(activation_bytes(cfg, "fp32", False) / (kept[1] - kept[0]) - 1) < 0.05
    assert 0.4 < activation_bytes(cfg, "bf16", False) / activation_bytes(cfg, "fp32", False) < 0.85


def test_compiled_blocks_keep_less():
    """Measured: 0.56 in bf16, 0.74 in fp32."""
    eager, compiled = (activation_bytes(config(n_embd=64), "bf16", False, c) for c in (False, True))
    assert 0.4 * eager < compiled < 0.8 * eager


def test_compiled_losses_keep_logits_once_in_the_products_precision(monkeypatch):
    monkeypatch.setattr("minit2i.experiments.plan.activation_bytes", lambda *args: 0)
    for precision, fp32_logits, size in (("fp32", False, 4), ("bf16", False, 2), ("bf16", True, 4)):
        cfg = config(n_codes=4096, fp32_logits=fp32_logits)
        text, image = cfg.text_len * cfg.n_vocab, cfg.n_image * cfg.n_codes
        eager, compiled = (
            memory_by_part(cfg, PlanConfig(batch_size=2, compile=c), precision)["activations"] for c in (False, True)
        )
        assert eager == 2 * (4 * text + 12 * image) and compiled == 2 * size * (text + image)
    assert ["fp32, compiled," in plan(cfg, PlanConfig(compile=c), "fp32")[2] for c in (False, True)] == [False, True]


@pytest.mark.parametrize(
    "change",
    [{"model": "masked"}, {"model": "captioner"}, {"condition": "text,coarse", "shrink": 3}]
    + [{"condition": "encoder", "n_encoder": 1}, {"model": "masked", "condition": "encoder", "n_encoder": 1}]
    + [{"model": "masked", "condition": "encoder,coarse_codes", "n_encoder": 1} | COARSE | {"coarse_ratio": 3}],
    ids=str,
)
def test_every_kind_of_prior_has_a_plan(change):
    cfg = config(grid_h=6, grid_w=9, **change)
    assert sum(parameters(cfg).values()) == sum(w.numel() for w in build_prior(asdict(cfg)).parameters())
    lines = plan(cfg, PlanConfig(processes=2), "bf16")
    assert training_flops(cfg) > 0 and "all of these" in "".join(lines)


def test_inner_activations_grow_with_the_inner_width():
    kept = [activation_bytes(config(n_embd=64, mlp_inner=n), "fp32", False) for n in (176, 0, 160, 80)]
    assert kept[0] == kept[1] > kept[2] > kept[3] > 0.5 * kept[0]
    assert (kept[1] - kept[2]) * 5 == pytest.approx(kept[2] - kept[3], rel=0.01)


def test_a_plan_says_what_a_process_holds():
    how = PlanConfig(processes=8, batch_size=64, steps=1000, peak_tflops=100.0, mfu=0.5, ema=0.999)
    cfg = prior_config(SIZES["parti-350m"] | {"condition": "text", "mask": "causal"})[1]

    def memory(**change):
        lines = plan(cfg, replace(how, **change), "fp16")
        return {line[:20].strip(): float(line.split()[-2]) for line in lines if line.endswith("GiB")}

    params = sum(parameters(cfg).values()) / 2**30
    ddp, fsdp = memory(), memory(strategy="fsdp")
    assert memory(strategy="hsdp") == fsdp and memory(strategy="hsdp", processes=16, batch_size=128) == fsdp
    assert ddp["optimizer"] == pytest.approx(8 * params, abs=0.01) == pytest.approx(8 * fsdp["optimizer"], abs=0.05)
    assert ddp["all of these"] == pytest.approx(sum(v for k, v in ddp.items() if k != "all of these"), abs=0.05)
    assert memory(checkpoint_activations=True)["activations"] < ddp["activations"] / 2
    assert memory(accum=8)["activations"] == pytest.approx(ddp["activations"] / 8, abs=0.01)
    assert memory(strategy="fsdp", accum=8)["gradients"] == ddp["gradients"]
    flops = training_flops(cfg) * 64 * 1000
    assert f"({flops / (8 * 50e12) / 3600:,.1f} hours)" in plan(cfg, how, "fp16")[-1]


PEAK = """
import json, torch
from functools import partial
from minit2i.experiments.bench import peak_memory
from minit2i.gpt import build_prior
from minit2i.train import EMA, TrainConfig, make_optimizer
def steps(settings, *sizes):
    model = build_prior(settings)
    optimizer, ema, cfg = make_optimizer(model, TrainConfig("")), EMA(model, 0.9), model.cfg
    for b in sizes:
        text, codes = torch.zeros(b, cfg.text_len, dtype=torch.long), torch.zeros(b, cfg.n_image, dtype=torch.long)
        sum(model.loss({"text": text, "codes": codes}).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
small, *others = json.loads(input())
torch.set_num_threads(1)
steps(small, 1)
for settings in others:
    print(peak_memory(partial(steps, settings, 1, 6), torch.device("cpu")))  # the first makes the optimizer's moments
"""


needs_linux = pytest.mark.skipif(not os.access(bench.CLEAR_REFS, os.W_OK), reason="/proc says what a process took")


@pytest.mark.slow
@needs_linux
def test_a_plan_is_near_the_peak_of_a_training():
    """Within 20 % in float32 on a CPU: of a prior whose logits take most of it, and of a larger one whose blocks do."""
    settings = SMALL | dict(n_embd=96, n_head=3, text_len=16, n_vocab=512, n_codes=256, grid_h=16, grid_w=16)
    both = settings | {"n_codes": 8192}, settings | {"n_layer": 6, "n_embd": 192, "n_head": 6}
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"}  # glibc then returns what is freed
    what = json.dumps([SMALL, *both])
    out = subprocess.run([sys.executable, "-c", PEAK], input=what, capture_output=True, text=True, env=env, check=True)
    for settings, peak in zip(both, out.stdout.split(), strict=True):
        parts = memory_by_part(prior_config(settings)[1], PlanConfig(batch_size=6), "fp32")
        assert sum(parts.values()) == pytest.approx(float(peak), rel=0.2)


# --- the command ---


def test_flags_win_over_a_named_size_and_that_over_a_recipe(tmp_path, capsys, monkeypatch):
    flags = f"--vq {tmp_path} --model_size dalle-12b --n_layer 3 --processes 16"
    cfg, how = planned(flags.split())
    assert asdict(cfg) == asdict(prior_config(SIZES["dalle-12b"] | {"n_layer": 3})[1]) and how.processes == 16
    cfg, how = planned(f"{flags} --recipe parti".split())
    recipe = RECIPES["parti"]["prior"]
    assert cfg.mlp == SIZES["dalle-12b"].get("mlp", recipe["mlp"]) and cfg.n_layer == 3 and how.ema == 0.999
    monkeypatch.setattr("sys.argv", ["plan", *flags.split(), "--batch_size", "16"])
    main()
    assert "3 layers, 3968 wide" in capsys.readouterr().out


def test_a_plan_takes_the_codes_of_a_tokenizer_and_the_words_of_a_language_model(tmp_path):
    text = Text(Text.train(["a red circle above a blue square"] * 9, 280), 5)
    vq = build_vq(dict(stride=8, ch=8, n_codes=16))
    config_ = {"kind": "vq", "model": asdict(vq.cfg), "data": {"image_size": "16x24"}}
    save_model(tmp_path / "vq", vq.state_dict(), config_)
    cfg, _ = planned(f"--vq {tmp_path / 'vq'} --vocab_size 99 --n_embd 64".split())
    assert (cfg.n_codes, cfg.grid_h, cfg.grid_w, cfg.n_vocab) == (16, 2, 3, 99)
    lm = build_prior(SMALL | SHAPE | {"n_vocab": text.n_vocab, "model": "llama"})
    save_llama(tmp_path / "lm", lm, text)
    cfg, _ = planned(f"--vq {tmp_path / 'vq'} --model llama --llama {tmp_path / 'lm'}".split())
    assert (cfg.n_vocab, cfg.n_embd, cfg.pos) == (text.n_vocab, 32, "sequence")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "a plan needs a tokenizer"),
        ("--model_size dalle-12b --processes 0", "processes 0 is not"),
        ("--model_size dalle-12b --mfu 0", "mfu 0.0 is not"),
        ("--model_size dalle-12b --batch_size 12 --processes 16", "into 16 micro-batches"),
        ("--model_size nowhere", "model_size 'nowhere' is not known"),
        ("--model_size dalle-12b --model masked", "a masked prior sees all positions"),
        ("--model towers --n_encoder 1", "a plan is for priors"),
    ],
)
def test_plans_that_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        planned(f"--vq {tmp_path} {flags}".split())


# --- the image of the masks, and the bench ---


def test_the_image_of_a_mask_is_the_mask():
    layout = gpt.Layout(2, 2, 3)
    image = masks.mask_image(layout, ["causal", "row"], cell=4, columns=2)
    assert image.size == (2 * (8 * 4 + 20) + 20, 8 * 4 + 40)
    for i, name in enumerate(("causal", "row")):
        visible = gpt.AttentionMask(name, layout).dense
        at = [[image.getpixel((20 + i * 52 + 4 * k + 3, 20 + 4 * q + 3)) for k in range(8)] for q in range(8)]
        assert [[pixel != (232, 232, 232) for pixel in row] for row in at] == visible.tolist()


def test_the_bench_times_what_it_names():
    """Each piece of work runs once, on a prior of a few codes."""
    device = torch.device("cpu")
    model, vq = build_prior(SMALL), build_vq(dict(stride=8, ch=8, n_res=1, n_codes=16))
    before = model.blocks[0].mlp.f.up.weight.clone()
    bench.prior_step(model, 2, device, "fp32", False)()
    assert not before.equal(model.blocks[0].mlp.f.up.weight)
    bench.vq_step(vq, torch.rand(2, 3, 16, 16), device, "fp32")()
    for settings in ({}, {"model": "masked"}):
        prior = build_prior(SMALL | settings).eval()
        codes = bench.sampling(prior, torch.zeros(1, 5, dtype=torch.long), 3)()
        assert codes.shape == (3, 12) and codes.min() >= 0
    bench.weights_alone(model, 2)
    times = bench.medians({"a": lambda: None}, device, 3)
    assert 0 <= times["a"] < 1


def freed_then_100_mb():
    """The peak memory of 100 MB, after 300 MB that were freed."""
    torch.ones(75_000_000)
    return bench.peak_memory(partial(torch.ones, 25_000_000), torch.device("cpu"))


@needs_linux
def test_the_bench_measures_peaks_that_are_freed():
    """In its own process, and not hidden by a higher peak before."""
    assert bench.in_own_process(freed_then_100_mb) == pytest.approx(100e6, rel=0.2)


@needs_linux
def test_the_bench_measures_the_memory_that_it_names(monkeypatch, capsys):
    """Every row, of 4 codes: weights and plan are the model's own."""
    monkeypatch.setattr(bench, "in_own_process", lambda f, *args: f(*args))
    how = bench.BenchConfig(memory=True, text_len=4, grid=2)
    bench.memory_table(how, torch.device("cpu"), "fp32")
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line[:28].strip(): [int(n) for n in line[28:].split()] for line in lines}
    assert head.split() == ["MB", "peak", "weights", "plan.py"] and len(rows) == 14
    weights = 4 * sum(parameters(how.prior).values()) / 1e6
    for name, (_, of_it, *planned_) in rows.items():
        assert len(planned_) == name.startswith("train prior"), name
        if name.startswith(("train prior", "sample")):
            assert of_it == round(weights)
    plan_ = memory_by_part(how.prior, PlanConfig(batch_size=4, ema=0.0), "fp32")
    assert rows["train prior, batch 4"][2] == round(sum(plan_.values()) / 1e6)
    assert rows["ema, 65536 codes"][1] == 17 and rows["st, 65536 codes"][1] == 9  # a table of 65,536 x 32 more


def test_memory_that_the_bench_cannot_measure():
    with pytest.raises(ValueError, match="no peak memory of mps on"):
        bench.peak_memory(lambda: None, torch.device("mps"))
    with pytest.raises(ValueError, match="--masks and --memory exclude each other"):
        bench.BenchConfig(masks=True, memory=True)
