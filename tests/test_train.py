"""What both scripts share: learning rate, optimizer, averaged weights, the step loop, devices, errors."""

import json
import os
import signal
import warnings

import pytest
import torch
from processes import fork, losses

from minit2i import train
from minit2i.collectives import all_gather
from minit2i.plot import read_log
from minit2i.train import EMA, Log, Processes, TrainConfig, check_finite, check_loss, lr_at, make_optimizer, steps


def test_learning_rate():
    cfg = TrainConfig(out="", lr=1.0, warmup=10, steps=110, min_lr=0.1)
    rates = [lr_at(s, cfg) for s in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and abs(rates[60] - 0.55) < 1e-9 and abs(rates[110] - 0.1) < 1e-9
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    late = TrainConfig(out="", lr=1.0, warmup=10, steps=1110, min_lr=0.1, schedule_start=1000)
    assert [lr_at(1000 + s, late) for s in range(111)] == rates


def loop(procs, cfg, start=0):
    return list(steps(cfg, procs, start))


def test_the_loop_evaluates_and_saves_at_its_end():
    """One more pass than steps: the last evaluation and save need no special case."""
    cfg = TrainConfig(out="", steps=5, eval_every=2)
    found = loop(Processes("cpu"), cfg)
    assert [step for step, *_ in found] == [0, 1, 2, 3, 4, 5]
    assert [step for step, evaluate, *_ in found if evaluate] == [2, 4, 5]
    assert [step for step, _, save, _ in found if save] == [2, 4, 5] and [end for *_, end in found][-1]
    resumed = loop(Processes("cpu"), TrainConfig(out="", steps=5, eval_every=2, resume=True), 5)
    assert resumed == [(5, True, False, True)], "what a finished run resumes from is on disk already"
    assert loop(Processes("cpu"), TrainConfig(out="", steps=0)) == [(0, True, True, True)]


def test_a_signal_ends_the_loop_with_a_save():
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        for step, evaluate, save, end in steps(TrainConfig(out="", steps=9), Processes("cpu"), 0):
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
        assert (step, evaluate, save, end) == (4, False, True, True)
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C stops at once
            for _ in steps(TrainConfig(out="", steps=9), Processes("cpu"), 0):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for s, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
            signal.signal(s, handler)


def test_a_devices_absence_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not known or not here; use auto, or"):
        train.pick_device("cuda")
    assert train.pick_device("cpu").type == "cpu"


def test_weight_decay_spares_gains_biases_and_codebooks():
    class Model(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.codebook = torch.nn.Parameter(torch.ones(4, 3))
            self.frozen = torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)

    model = Model()
    decayed, kept = make_optimizer(model, TrainConfig(out="", weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5 and [*map(id, decayed["params"])] == [id(model.weight)]
    assert kept["weight_decay"] == 0 and {*map(id, kept["params"])} == {id(model.bias), id(model.codebook)}


def test_muon_moves_all_directions_of_a_matrix_alike():
    """Its step is lr * 0.2 sqrt(the longer side) along U V^T of the gradient U S V^T; the rest takes AdamW's step."""
    blocks = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 9)]), "head": torch.nn.Linear(6, 9)}
    )
    matrix, others = blocks["blocks"][0].weight, [blocks["blocks"][0].bias, *blocks["head"].parameters()]
    before = {w: w.detach().clone() for w in blocks.parameters()}
    u, _, vt = torch.linalg.svd(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    for w in blocks.parameters():
        w.grad = torch.ones_like(w)
    matrix.grad = u @ torch.diag(torch.logspace(0, -1, 6)) @ vt  # tenfold between the first direction and the last
    optimizer = make_optimizer(blocks, TrainConfig(out="", lr=1e-2, weight_decay=0.5), muon=True)
    optimizer.step()
    moved = (before[matrix] * (1 - 1e-2 * 0.5) - matrix) / (1e-2 * 0.2 * 9**0.5)
    along = u.T @ moved.detach() @ vt.T
    assert ((along.diagonal() > 0.6) & (along.diagonal() < 1.3)).all()  # the precision of five Newton-Schulz steps
    assert (along - along.diagonal().diag()).abs().max() < 0.02
    decay = [1 - 1e-2 * 0.5 * (w.dim() == 2) for w in others]
    assert all(torch.allclose(before[w] * d - w, torch.full_like(w, 1e-2), atol=1e-6) for w, d in zip(others, decay))
    assert set(optimizer.state) == set(blocks.parameters()) and len(optimizer.param_groups) == 3


def test_ema_equals_a_loop():
    model = torch.nn.Linear(3, 2)
    ema, expected = EMA(model, 0.5), model.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(ema.weights["weight"], expected)
    raw = model.weight.detach().clone()
    with ema.applied(model):
        assert torch.allclose(model.weight, expected) and not model.training
    assert model.weight.equal(raw) and model.training


def test_nan_and_inf_are_found():
    procs, model = Processes("cpu"), torch.nn.Linear(3, 2)
    check_finite(model, procs, 0, {"loss": 1.0})
    for values in ({"loss": float("nan")}, {"loss": 1.0, "psnr": float("inf")}):
        with pytest.raises(ValueError, match="the training has diverged before step 7: .*; the last checkpoint stays"):
            check_finite(model, procs, 7, values)
    with torch.no_grad():
        model.bias[0] = float("nan")
    with pytest.raises(ValueError, match="--resume with a lower --lr or --clip, or in another --precision"):
        check_finite(model, procs, 7)


def test_the_log_drops_what_was_written_after_the_checkpoint(tmp_path):
    log = Log(tmp_path, True, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.23456789, grad_norm=1e-7)
    with open(log.path, "a") as f:
        f.write('{"step": 4, "lo')
    assert losses(tmp_path) == [(k, 1.234568, 1e-7) for k in (1, 2, 3)]
    Log(tmp_path, True, 2)
    assert [r["step"] for r in read_log(log.path)] == [1, 2]
    Log(tmp_path / "other", False, 0).write(step=1)
    assert not (tmp_path / "other").exists(), "only the first process writes"
    log.evaluation(4, {"val_loss": 2.0}, ["loss", "missing"])
    assert json.loads(log.path.read_text().splitlines()[-1]) == {"step": 4, "val_loss": 2.0}
    assert (tmp_path / "loss.png").exists()


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\nnull\n[1]\n{"loss": 3.0}\n\xff\xfe\n{"step": 2}\n')
    Log(tmp_path, True, 9)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_a_loss_alone_may_overflow(monkeypatch):
    """Float16: the scaler skips that step.  With a weight, or a codebook, the training is lost."""
    procs, model = Processes("cpu"), torch.nn.BatchNorm1d(3)
    check_loss(float("inf"), model, procs, 5)
    model.running_mean[0] = float("inf")  # a buffer, as a codebook is
    check_loss(1.0, model, procs, 5)
    with pytest.raises(ValueError, match="diverged before step 5"):
        check_loss(float("inf"), model, procs, 5)


def gather():
    """All parts, and the gradient of this process's own."""
    rank = Processes("cpu").rank
    x = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own differentiable all_gather is deprecated
        together = all_gather(x)
        (together * torch.tensor([[1.0, 10.0], [100.0, 1000.0]]) * (rank + 1)).sum().backward()
    return together.detach(), x.grad


def test_gathered_parts_send_their_gradients_back():
    together, gradient = fork(2, gather)
    assert together.tolist() == [[1, 2], [2, 4]] and gradient.tolist() == [[3, 30]], "summed over both ranks"


def test_user_errors_print_one_line(monkeypatch):
    monkeypatch.setattr(train, "keep_memory", lambda: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)
    monkeypatch.delenv("MINIT2I_TRACEBACK", raising=False)

    def fails():
        raise ValueError("lr 7 is not a number of at most 1; use 1")

    def memory():
        torch.empty(2**45)

    def bug():
        raise RuntimeError("shapes differ")

    with pytest.raises(SystemExit, match="error: lr 7 is not"):
        train.run(fails)
    with pytest.raises(SystemExit, match="error: not enough memory .*; use a smaller batch, image or model"):
        train.run(memory)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.run(bug)
    monkeypatch.setenv("MINIT2I_TRACEBACK", "1")
    with pytest.raises(ValueError):
        train.run(fails)
