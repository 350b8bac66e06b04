"""The toy experiment in float16, as far as arithmetic alone decides how it ends."""

import math

import pytest
import torch
from processes import call

from minit2i.experiments import stability
from minit2i.experiments.stability import RUNS, TOY, StabilityConfig, provoke, stripes, train_toy
from minit2i.gpt import build_prior


def test_stripes_are_a_pure_function_of_the_step_and_the_seed():
    a, b = stripes(3, 8), stripes(3, 8)
    assert all(v.equal(b[k]) for k, v in a.items()) and not stripes(4, 8)["codes"].equal(a["codes"])
    assert not stripes(3, 8, seed=1)["codes"].equal(a["codes"])
    assert a["text"].shape == (8, 4) and int(a["codes"].max()) < TOY["n_codes"]


def test_provoking_scales_the_weights_it_names():
    torch.manual_seed(0)
    plain = build_prior(TOY | {"n_layer": 1})
    torch.manual_seed(0)
    model = build_prior(TOY | {"n_layer": 1})
    provoke(model, 8.0, 4.0)
    before, after = plain.blocks[0], model.blocks[0]
    d = TOY["n_embd"]
    ratio = after.attn.f.qkv.weight / before.attn.f.qkv.weight
    assert (ratio[: 2 * d] == 8).all() and (ratio[2 * d :] == 1).all()
    assert after.mlp.f.down.weight.equal(before.mlp.f.down.weight * 4)


def test_a_scale_beyond_float16_ends_a_run_at_once_and_float32_survives():
    """Branches 10^8 times larger exceed 65,504 in the first forward pass of float16, whatever the CPU."""
    cfg = StabilityConfig(n_layer=2, steps=2, batch=1, branches=1e8)
    losses, place, skipped, loss = train_toy(cfg, **RUNS["float16"])
    assert losses == [] and place and skipped == 0 and math.isnan(loss)
    losses, place, _, loss = train_toy(cfg, **RUNS["float32"])
    assert len(losses) == 2 and place == "" and math.isfinite(loss)


def test_pb_relax_holds_scores_that_overflow():
    """Queries and keys 1,600 times larger: scores of 2 million in the first forward pass."""
    cfg = StabilityConfig(n_layer=2, steps=1, batch=1, scores=1600)
    names = ("", ", PB-Relax", ", Sandwich-LN", ", both")
    lives = [len(train_toy(cfg, **RUNS[f"float16, loss scaling{name}"])[0]) for name in names]
    assert lives == [0, 1, 0, 1]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_runs(name):
    assert len(train_toy(StabilityConfig(n_layer=1, steps=1, batch=1, lr=1e-4), **RUNS[name])[0]) == 1


def test_finished_runs_are_kept(tmp_path, monkeypatch, capsys):
    """Killed in the fourth of six runs: started again, the command does three."""
    done = []

    def train(cfg, seed, **how):
        done.append((len(how), seed))
        if len(done) == 4:
            raise KeyboardInterrupt
        return [3.0, 2.0 + seed], "", 0, 2.0 + seed

    monkeypatch.setattr(stability, "train_toy", train)
    monkeypatch.setattr(stability, "RUNS", {k: RUNS[k] for k in ("float32", "float16", "float32, CogView's")})
    flags = f"--seeds 2 --steps 2 --out {tmp_path / 'a.png'}"
    with pytest.raises(KeyboardInterrupt):
        call(stability, flags)
    call(stability, flags)
    assert len(done) == 7 and len(set(done)) == 6 and (tmp_path / "a.png").exists()
    assert "| float16 | 2 | 0 | nothing | 2.50 (2.00..3.00) |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds runs with the settings .* use another --out"):
        call(stability, f"{flags} --lr 1")


def test_a_table_names_survival_and_curves_say_where_a_run_ended():
    nan = math.nan
    results = {"a": [([1.0] * 10, "", 0, 1.0)], "b": [([1.0] * 4, "x", 1, nan), ([1.0] * 7, "loss", 1, nan)]}
    assert set(stability.curves(results, 10)) == {"a", "b (ended after 4)"}
    assert stability.table(results, 10)[-1] == "| b | 4..7 | 1 | loss, x |  |"
