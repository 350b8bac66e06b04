"""The claims: their flags are flags, verdicts follow from the figures, and finished runs are not repeated."""

import json

import pytest
from processes import call

import train_prior
import train_vq
from minit2i import tokenizer_losses, vq
from minit2i.experiments import claims
from minit2i.experiments.claims import CLAIMS, ClaimsConfig, verdict
from minit2i.flags import parse_flags
from minit2i.gpt import CONDITIONS, MODELS, GPTConfig, build_prior
from minit2i.train import n_params


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claims_flags_are_those_of_its_script(name, tmp_path):
    claim = CLAIMS[name]
    lines = [f"{claim.command} {flags}" for _, flags in (claim.first, claim.second)] + [*claim.before.values()]
    for line in lines:
        script, *argv = line.replace("--init {towers}", "").split() + ["--out", str(tmp_path / "x")]
        if script == "train_prior.py":
            configs, parts = (GPTConfig, train_prior.DataConfig, train_prior.PriorTrainConfig), {}
            model, *_ = parse_flags("", configs, parts | {"model": MODELS, "condition": CONDITIONS}, {}, argv=argv)
        else:
            assert script == "train_vq.py"
            configs = (vq.VQConfig, train_vq.VQDataConfig, train_vq.VQTrainConfig)
            parse_flags("", configs, vq.PARTS | tokenizer_losses.PARTS, {}, argv=argv)
    assert claim.first[1] != claim.second[1] and claim.sign in (1, -1)


def test_encoder_decoder_and_decoder_have_as_many_parameters():
    shape, sizes = dict(n_embd=128, n_head=4, text_len=28, n_vocab=512, n_codes=512, grid_h=8, grid_w=8), []
    for _, flags in (CLAIMS["encoder-decoder"].first, CLAIMS["encoder-decoder"].second):
        words = flags.replace("--", "").split()
        settings = {k: int(v) if v.isdigit() else v for k, v in zip(words[::2], words[1::2])}
        sizes.append(n_params(build_prior(shape | settings)))
    assert abs(sizes[0] / sizes[1] - 1) < 0.01


@pytest.mark.parametrize(
    "first, second, sign, said",
    [
        ([3.0, 3.1, 2.9], [1.0, 1.1, 0.9], 1, "holds"),
        ([1.0, 1.1, 0.9], [3.0, 3.1, 2.9], 1, "does not hold here: the reverse"),
        ([1.0, 1.1, 0.9], [3.0, 3.1, 2.9], -1, "holds"),
        ([1.0, 3.0, 2.0], [1.5, 3.5, 2.0], -1, "undecided"),
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], 1, "undecided"),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 1, "holds"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_the_spread(first, second, sign, said):
    assert verdict(first, second, sign)[0] == said


def test_runs_are_trained_once_and_put_into_a_table(tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(claims, "run_script", lambda script, words, folder: runs.append((script, words, folder)))
    monkeypatch.setattr(claims, "measure", lambda folder, *_: {"val_image_loss": len(runs) + 0.001 * len(folder.name)})
    for _ in range(2):
        call(claims, f"pre-trained-encoder --out {tmp_path} --seeds 2")
    names = [folder.name for _, _, folder in runs]
    assert names == ["tokenizer", *["towers-0", "pre-trained-0", "towers-1", "pre-trained-1"], "from-scratch-0",
                     "from-scratch-1", "tokenizer"]  # fmt: skip
    first = " ".join(runs[2][1])
    assert f"--init {tmp_path / 'pre-trained-encoder' / 'towers-0'}" in first and "--seed 0" in first
    table = json.loads((tmp_path / "claims.json").read_text())
    assert len(table["rows"]) == 1 and len(table["rows"][0]) == len(table["columns"])
    assert "Parti" in capsys.readouterr().out


def test_unknown_claims_are_refused_and_none_lists_them(tmp_path, capsys):
    with pytest.raises(ValueError, match="claim 'nothing' is not known"):
        call(claims, f"nothing --out {tmp_path}")
    call(claims, "")
    assert all(name in capsys.readouterr().out for name in ["hidden-pads"])
    assert ClaimsConfig().seeds >= 2
