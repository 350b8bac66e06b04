"""Named sizes against the papers, and --plan against what can be counted."""

from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_prior
from minit2i import plan as planning
from minit2i.checkpoint import save_model
from minit2i.flags import parse_flags
from minit2i.gpt import GPT, SIZES, GPTConfig
from minit2i.lm import LM_SHAPE, save_lm
from minit2i.plan import activation_bytes, parameters, plan, training_flops
from minit2i.tokens import Text
from minit2i.vq import VQ, VQConfig
from train_prior import DataConfig, PriorTrainConfig

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, text_len=5, n_vocab=11, n_codes=7, grid_h=3, grid_w=4)


def test_papers_sizes_have_the_papers_parameters():
    """Within 2 %: CogView's whole (4 B); DALL-E's without heads (12 B), as whole it is 2.4 % above the rounded figure."""
    dalle, cogview = (parameters(GPTConfig(**SIZES[name])) for name in ("dalle-12b", "cogview-4b"))
    assert abs(dalle["blocks"] + dalle["embeddings"] - 12e9) < 0.02 * 12e9
    assert abs(sum(cogview.values()) - 4e9) < 0.02 * 4e9
    for name, paper in (("350m", 350e6), ("750m", 750e6), ("3b", 3e9), ("20b", 20e9)):  # blocks only, 0.7 to 2 % above
        assert abs(parameters(GPTConfig(**SIZES[f"parti-{name}"]))["blocks"] - paper) < 0.021 * paper


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_model(name):
    cfg = GPTConfig(**{"n_vocab": 50, "n_codes": 20, "grid_h": 4, "grid_w": 4} | SIZES[name])
    narrow = replace(cfg, n_embd=cfg.n_head * 4, n_layer=3, grid_h=4, grid_w=4, text_len=8)
    text, codes = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)
    assert all(loss.isfinite() for loss in GPT(narrow)(text, codes))
    assert sum(parameters(SMALL).values()) == sum(w.numel() for w in GPT(SMALL).parameters())


def test_flops_are_those_that_run():
    cfg = replace(SMALL, mask="none")
    model = GPT(cfg).double()  # a fused kernel's backward would make its scores once more
    text, codes = torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        x = model.trunk(torch.cat([text, model.code_ids(codes)], 1))
        (model.text_head(x[:, :4]).sum() + model.image_head(x[:, 4:-1]).sum()).backward()
    assert counter.get_total_flops() == training_flops(cfg)
    cfg = replace(cfg, n_encoder=3)
    model = GPT(cfg).double()
    with FlopCounterMode(display=False) as counter:
        before, memory = model.read(text)
        x = model.trunk(torch.cat([before, model.embedding(model.code_ids(codes))], 1), memory=memory)
        model.image_head(x[:, :-1]).sum().backward()
    assert counter.get_total_flops() == training_flops(cfg)
    assert training_flops(replace(cfg, mask="row")) < training_flops(replace(cfg, mask="full")) < training_flops(cfg)


@pytest.mark.parametrize(
    "change", [{}, {"mlp": "gelu", "norm": "layernorm", "qk_norm": False, "sandwich": True}], ids=str
)
def test_activations_are_those_that_are_kept(change):
    cfg = replace(SMALL, grid_h=20, grid_w=30, n_embd=96, **change)
    kept = []
    for n_layer in (1, 2):
        model, seen = GPT(replace(cfg, n_layer=n_layer)), {}
        own = {w.untyped_storage().data_ptr() for w in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(id(t.untyped_storage()), t), lambda t: t
        ):
            loss = sum(model(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 600, dtype=torch.long)))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen.values()}
        kept.append(sum(n for ptr, n in storages.items() if ptr not in own))
        del loss
    assert abs(activation_bytes(cfg, "fp32") / (kept[1] - kept[0]) - 1) < 0.05
    assert 0.4 < activation_bytes(cfg, "bf16") / activation_bytes(cfg, "fp32") < 0.85


@pytest.mark.parametrize(
    "change",
    [{"objective": "masked"}, {"order": "image"}, {"low": 3}, {"n_states": 6}, {"n_states": 6, "n_encoder": 1}],
    ids=str,
)
def test_every_kind_of_prior_has_a_plan(change):
    cfg = replace(SMALL, grid_h=6, grid_w=9, **change)
    assert sum(parameters(cfg).values()) == sum(w.numel() for w in GPT(cfg).parameters())
    assert training_flops(cfg) > 0 and "all of these" in "".join(plan(cfg, PriorTrainConfig(out=""), "bf16", 2))


def test_the_inner_width_grows_with_the_width():
    kept = [activation_bytes(replace(SMALL, n_embd=64, mlp_inner=inner), "fp32") for inner in (176, 0, 160, 80)]
    assert kept[0] == kept[1] > kept[2] > kept[3] > 0.5 * kept[0]
    assert (kept[1] - kept[2]) * 5 == pytest.approx(kept[2] - kept[3], rel=0.01)


def test_a_plan_with_a_text_encoder_or_a_language_model(tmp_path, capsys, monkeypatch):
    text, t5, lm = Text.train(["a red circle above a blue square"] * 9, 280), tmp_path / "t5", tmp_path / "lm"
    save_lm(lm, GPT(replace(SMALL, **LM_SHAPE, n_vocab=280)), Text(text, 5))
    t5.mkdir()
    (t5 / "config.json").write_text('{"d_model": 12}')
    parsed = []
    monkeypatch.setattr(planning, "plan", lambda cfg, *_: parsed.append(cfg) or [])
    vq, none = VQConfig(stride=8, ch=8, n_codes=16), tmp_path / "none"
    save_model(tmp_path, VQ(vq).state_dict(), {"kind": "vq", "model": asdict(vq), "data": {"size": "16"}})
    save_model(tmp_path / "prior", {}, {"kind": "prior", "model": asdict(replace(SMALL, n_vocab=280))})
    for flags in (
        ["--text_encoder", t5, "--vq", none, "--model_size", "dalle-12b"],
        ["--init_lm", lm, "--vq", tmp_path],
        ["--init", tmp_path / "prior", "--vq", tmp_path, "--vocab_size", 999],
    ):
        argv = ["train_prior.py", "--out", "x", "--plan", 1, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        train_prior.main()
    assert (parsed[0].n_states, parsed[0].n_vocab, parsed[0].text_loss) == (12, 0, False)
    assert (parsed[1].n_vocab, parsed[1].n_embd, parsed[1].pos) == (len(Text(text, 5).sp), 32, "sequence")
    assert parsed[2].n_vocab == 280  # the other prior's words


def test_a_plan_says_what_a_process_holds():
    train = PriorTrainConfig(out="", batch_size=64, steps=1000, peak_tflops=100.0, mfu=0.5)
    cfg = GPTConfig(**SIZES["parti-350m"] | {"n_encoder": 0})

    def memory(**change):
        lines = plan(cfg, replace(train, **change), "fp16", 8)
        return {line[:20].strip(): float(line.split()[-2]) for line in lines if line.endswith("GiB")}

    params = sum(parameters(cfg).values()) / 2**30
    ddp, fsdp = memory(), memory(strategy="fsdp")
    assert ddp["optimizer"] == pytest.approx(8 * params, abs=0.01) == pytest.approx(8 * fsdp["optimizer"], abs=0.05)
    assert ddp["all of these"] == pytest.approx(sum(v for k, v in ddp.items() if k != "all of these"), abs=0.05)
    assert memory(checkpoint_activations=True)["activations"] < ddp["activations"] / 3
    assert memory(accum=8)["activations"] == pytest.approx(ddp["activations"] / 8, abs=0.01)
    assert memory(strategy="fsdp", accum=8)["gradients"] == ddp["gradients"]
    flops = training_flops(cfg) * 64 * 1000
    assert f"({flops / (8 * 50e12) / 3600:,.1f} hours)" in plan(cfg, train, "fp16", 8)[-1]


def test_flags_win_over_a_named_size(tmp_path, capsys, monkeypatch):
    argv = ["--out", str(tmp_path / "x"), "--model_size", "dalle-12b", "--n_layer", "3"]
    cfg, _, _ = parse_flags("", GPTConfig, DataConfig, PriorTrainConfig, argv)
    expected = asdict(GPTConfig(**SIZES["dalle-12b"])) | {"n_layer": 3}
    assert asdict(cfg) == expected
    monkeypatch.setattr("sys.argv", ["train_prior.py", *argv, "--vq", str(tmp_path), "--plan", "16"])
    train_prior.main()
    assert "3 layers, 3968 wide" in capsys.readouterr().out and not (tmp_path / "x").exists()
    monkeypatch.setattr("sys.argv", ["train_prior.py", "--out", "x", "--vq", str(tmp_path), "--plan", "16"])
    with pytest.raises(ValueError, match="--plan needs a tokenizer"):
        train_prior.main()
    for flag, value in (("--plan", "-1"), ("--mfu", "0"), ("--cond_drop", "2"), ("--crops", "0")):
        monkeypatch.setattr("sys.argv", ["train_prior.py", "--out", "x", "--plan", "16", flag, value])
        with pytest.raises(ValueError, match=flag[2:]):
            train_prior.main()
    for flags, message in ((["--objective", "masked"], "mask dalle"), (["--batch_size", "12"], "into 16 parts")):
        monkeypatch.setattr("sys.argv", ["train_prior.py", *argv, "--vq", str(tmp_path), "--plan", "16", *flags])
        with pytest.raises(ValueError, match=message):  # as the training would
            train_prior.main()
