"""Decoders and super-resolution trained afterwards, on codes that stay."""

from dataclasses import replace

import pytest
import torch

import train_vq
from minit2i.checkpoint import read_config, save_model
from minit2i.sample import Painter, load_vq
from test_train import call, equal, pictures, prior, vq  # noqa: F401


def quick(out, *flags):
    call(
        train_vq,
        "--out",
        out,
        "--steps",
        3,
        *"--lr 1e-2 --batch_size 8 --workers 0 --log_every 1 --eval_size 8".split(),
        *flags,
    )
    return out


def test_a_finetuned_decoder_keeps_every_code_to_the_bit(vq, prior, pictures, tmp_path):  # noqa: F811
    """Encoder and codebook stay, also over a resume; the decoder is larger, of another kind, and draws other pictures."""
    larger = "--decoder", "movq", "--decoder_ch", 16, "--decoder_n_res", 2
    fine = quick(tmp_path / "fine", "--data", pictures, "--finetune_decoder", vq, *larger)
    call(train_vq, "--resume", "--out", fine, "--steps", 5)
    before, after = load_vq(vq), load_vq(fine)
    x = torch.rand(64, 3, 32, 32) * 2 - 1
    codes = before.encode(x)
    assert after.encode(x).equal(codes) and not after.decode(codes).equal(before.decode(codes))
    state = after.state_dict()
    stays = [k for k in before.state_dict() if k.startswith(("encoder", "quantizer"))]
    assert all(state[k].equal(before.state_dict()[k]) for k in stays) and len(stays) > 5
    assert after.cfg == replace(before.cfg, decoder="movq", decoder_ch=16, decoder_n_res=2)
    assert sum(w.numel() for w in after.decoder.parameters()) > 2 * sum(w.numel() for w in before.decoder.parameters())
    painter = Painter(prior, vq=fine)
    assert painter.vq.cfg.decoder == "movq"
    same = quick(tmp_path / "same", "--data", pictures, "--finetune_decoder", vq, "--lr", 0)
    assert equal(same / "model.safetensors", vq / "model.safetensors"), "one of the same shape starts as the old one"


def test_super_resolution_on_top_of_a_frozen_tokenizer(vq, prior, pictures, tmp_path):  # noqa: F811
    flags = "--data", pictures, "--super_resolution", vq, "--upscale", 2, "--sr_ch", 8, "--sr_blocks", 1
    large = load_vq(quick(tmp_path / "x2", *flags))
    small, x = load_vq(vq), torch.rand(4, 3, 32, 32) * 2 - 1
    assert large.encode(x).equal(small.encode(x))
    y = large.decode(small.encode(x))
    bicubic = torch.nn.functional.interpolate(small.decode(small.encode(x)), scale_factor=2, mode="bicubic")
    assert y.shape == (4, 3, 64, 64) and 0 < (y - bicubic).abs().max() < 0.5
    painter = Painter(prior, vq=tmp_path / "x2")
    assert painter.images(torch.zeros(1, 4, 4, dtype=torch.long)).shape == (1, 3, 64, 64) and painter.size == (32, 32)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--finetune_decoder", "VQ", "--stride", "4"], "--stride 4 would change what stays of .* (8); leave it out"),
        (["--finetune_decoder", "VQ", "--l2_norm"], "--l2_norm True would change what stays"),
        (["--finetune_decoder", "VQ", "--init", "VQ"], "use one of --init, --finetune_decoder and"),
        (["--super_resolution", "VQ"], "needs --upscale 2 or 4"),
        (["--super_resolution", "VQ", "--upscale", "2", "--recon", "logit_laplace"], "use --recon l1 or l2"),
        (["--upscale", "2"], "--upscale needs --super_resolution"),
        (["--finetune_decoder", "nowhere"], "nowhere is not a checkpoint folder"),
    ],
)
def test_decoders_that_cannot_be_trained_are_refused(flags, message, vq, pictures, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message.replace("(8)", r"\(8\)")):
        quick(tmp_path / "x", "--data", pictures, *(str(vq) if f == "VQ" else f for f in flags))


def test_a_prior_draws_with_the_codes_it_learned_only(prior, pictures, tmp_path):  # noqa: F811
    other = quick(
        tmp_path / "other",
        "--data",
        pictures,
        *"--stride 8 --ch 8 --n_codes 32 --code_dim 8 --size 32 --seed 5".split(),
    )
    with pytest.raises(ValueError, match="the codes of .*other are not those of"):
        Painter(prior, vq=other)
    own = load_vq(prior / "vq").state_dict()
    moved = {k: v + 0.1 if k.startswith("encoder") else v for k, v in own.items()}
    save_model(tmp_path / "moved", moved, read_config(prior / "vq"))  # as two of fsq: the same codebook, other codes
    with pytest.raises(ValueError, match="the codes of .*moved are not those of"):
        Painter(prior, vq=tmp_path / "moved")
