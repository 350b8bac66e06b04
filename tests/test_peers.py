"""The comparison with other libraries times what it says; none of them is needed here."""

import pytest
import torch

from minit2i.experiments import peers


@pytest.mark.parametrize("threads, timer", [(1, "process_time"), (2, "perf_counter")])
def test_ratios_are_those_of_the_calls_own_seconds(threads, timer, monkeypatch, capsys):
    """Each work advances a clock by its own seconds, CPU seconds with one thread; the warm-up round is left out."""
    clock, calls = [0.0], []
    monkeypatch.setattr(peers.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(peers.time, timer, lambda: clock[0])

    def work(name, seconds):
        def f():
            calls.append(name)
            clock[0] += 100 if len(calls) <= 2 else seconds

        return f

    peers.report("step", "small", 6, {"ours": work("ours", 2), "theirs": work("theirs", 3)}, rounds=3)
    assert calls == ["ours", "theirs"] * 4  # in turn
    assert capsys.readouterr().out == "step, small, ours: 3 images/s, theirs 2; 1.50 times (1.50 to 1.50)\n"


def test_only_keeps_ours_and_its_bounds():
    names = ["ours", "ours, compiled", "weights alone", "gpt-fast", "gpt-fast, compiled", "GPT-2, static and compiled"]
    works = dict.fromkeys(names)
    assert list(peers.chosen(works, "")) == names
    assert list(peers.chosen(works, "gpt-fast$")) == ["ours", "weights alone", "gpt-fast"]
    assert list(peers.chosen(works, "compiled")) == [name for name in names if name != "gpt-fast"]


def test_a_clone_is_imported_with_what_its_root_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.sys, "path", [*peers.sys.path])
    with pytest.raises(ValueError, match="clone LlamaGen into"):
        peers.checkout(tmp_path, "LlamaGen")
    file = tmp_path / "LlamaGen" / peers.REPOS["LlamaGen"]
    file.parent.mkdir(parents=True)
    (tmp_path / "LlamaGen" / "besides_minit2i.py").write_text("x = 5")
    file.write_text("from besides_minit2i import x")
    assert peers.checkout(tmp_path, "LlamaGen").x == 5


def test_a_training_step_of_a_peer_learns():
    net, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
    step = peers.training_step(net, lambda net: (net(x) - 1).square().mean(), peers.PeersConfig())
    before = net.weight.clone()
    step()
    assert not net.weight.equal(before) and net.weight.grad is None


def test_codes_of_a_peer_are_sampled_one_by_one():
    """The code after c is c + 1 for sure: each step gets the last code and its own position."""
    seen, t, n = [], peers.PRIOR.text_len, 5

    def logits(code, at):
        seen.append((code.tolist(), at.tolist()))
        return torch.full((2, 1, 9), -1e9).scatter_(2, code[:, None] + 1, 0)

    def first():
        return torch.full((2, 4, 9), -1e9).index_fill_(2, torch.tensor([3]), 0)

    peers.one_by_one("theirs", first, logits, n)["theirs"]()
    assert seen == [([[3 + i], [3 + i]], [t + i]) for i in range(n - 1)]
