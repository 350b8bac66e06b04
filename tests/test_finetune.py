"""train_vq.py: decoders and upsamplers trained afterwards, on codes that stay; what a run leaves."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import VQ_FLAGS
from PIL import Image
from processes import call
from safetensors.torch import load_file

import train_vq
from minit2i.checkpoint import load_vq, read_config, save_model
from minit2i.plot import read_log
from minit2i.sample import Pipeline

QUICK = "--steps 3 --lr 1e-2 --batch_size 8 --workers 0 --log_every 1 --device cpu --precision fp32"


def train_more(out, images, flags):
    call(train_vq, f"--out {out} --data {images} {QUICK} {flags}")
    return out


def random_images(n):
    return torch.rand(n, 3, 32, 32) * 2 - 1


def test_a_new_decoder_keeps_every_code_to_the_bit(vq_run, images, tmp_path):
    """Encoder and codebook stay, also over a resume; the decoder is larger, of another kind, and gives other images."""
    larger = "--train decoder --decoder movq --decoder_ch 16 --decoder_n_res 2"
    out = train_more(tmp_path / "larger", images, f"--init {vq_run} {larger}")
    call(train_vq, f"--resume --out {out} --steps 5")
    before, after, x = load_vq(vq_run), load_vq(out), random_images(64)
    codes = before.encode(x)
    assert after.encode(x).equal(codes) and not after.decode(codes).equal(before.decode(codes))
    old, new = before.state_dict(), after.state_dict()
    stays = [k for k in old if k.startswith(("encoder", "quantizer"))]
    assert all(new[k].equal(old[k]) for k in stays) and len(stays) > 5
    assert asdict(after.cfg) == asdict(before.cfg) | dict(decoder="movq", decoder_ch=16, decoder_n_res=2)
    assert sum(w.numel() for w in after.decoder.parameters()) > 2 * sum(w.numel() for w in before.decoder.parameters())


def test_a_decoder_of_the_same_shape_starts_as_the_old_one(vq_run, images, tmp_path):
    out = train_more(tmp_path / "same", images, f"--init {vq_run} --train decoder --lr 1e-30")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, vq_run))
    assert one.keys() == other.keys() and all(v.equal(other[k]) for k, v in one.items())


def test_an_upsampler_on_top_of_a_frozen_tokenizer(vq_run, images, tmp_path):
    flags = f"--init {vq_run} --train upsampler --upsampler wdsr --upscale 2 --sr_ch 8 --sr_blocks 1"
    large = load_vq(train_more(tmp_path / "x2", images, flags))
    small, x = load_vq(vq_run), random_images(4)
    codes = small.encode(x)
    assert large.encode(x).equal(codes)
    y, bicubic = large.decode(codes), F.interpolate(small.decode(codes), scale_factor=2, mode="bicubic")
    assert y.shape == (4, 3, 64, 64) and 0 < (y - bicubic).abs().max() < 0.5


def test_a_prior_decodes_with_a_decoder_and_an_upsampler_trained_later(vq_run, prior_run, images, tmp_path):
    flags = f"--init {vq_run} --train upsampler --upsampler wdsr --upscale 2 --sr_ch 8 --sr_blocks 1"
    pipeline = Pipeline(prior_run, vq=train_more(tmp_path / "x2", images, flags))
    assert pipeline.decode(torch.zeros(1, 4, 4, dtype=torch.long)).shape == (1, 3, 64, 64)
    assert pipeline.size == (32, 32)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--init VQ --train decoder --stride 4", r"--stride 4 would change what stays of .* \(8\); leave it out"),
        ("--init VQ --train decoder --l2_norm", "--l2_norm True would change what stays"),
        ("--train decoder", "--train decoder needs --init, the folder of a trained tokenizer"),
        ("--init VQ --train upsampler", "use --init X --train upsampler --upsampler wdsr"),
        ("--init VQ --train upsampler --upsampler wdsr --recon logit_laplace", "needs l1 or l2 instead"),
        ("--upsampler wdsr", "use --init X --train upsampler --upsampler wdsr"),
        ("--init nowhere --train decoder", "nowhere is not a checkpoint folder"),
    ],
)
def test_impossible_finetuning_is_refused(flags, message, vq_run, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_more(tmp_path / "x", images, flags.replace("VQ", str(vq_run)))


def test_a_prior_refuses_codes_that_it_did_not_learn(vq_run, prior_run, tmp_path):
    own, config = load_vq(prior_run / "vq").state_dict(), read_config(prior_run / "vq")
    for part in ("quantizer.codebook", "encoder"):  # with fsq all codebooks are alike: the encoder decides too
        moved = {k: v + 0.1 if k.startswith(part) else v for k, v in own.items()}
        save_model(tmp_path / part, moved, config)
        with pytest.raises(ValueError, match=f"{part} has other codes than this prior's tokenizer"):
            Pipeline(prior_run, vq=tmp_path / part)


# --- the training script itself ---


def test_init_keeps_a_trained_codebook(images, tmp_path):
    """k-means ran at step 3 of the first run; a run that starts from it neither repeats that nor skips quantization."""
    flags = f"--data {images} {VQ_FLAGS} --quantizer fixed --steps 6 --eval_every 6"
    call(train_vq, f"--out {tmp_path / 'one'} {flags} --free_steps 3")
    call(train_vq, f"--out {tmp_path / 'two'} {flags} --init {tmp_path / 'one'}")
    one, two = (load_vq(tmp_path / name) for name in ("one", "two"))
    assert one.quantizer.codebook.equal(two.quantizer.codebook)
    assert not one.encoder[0].weight.equal(two.encoder[0].weight)
    with pytest.raises(ValueError, match="free_steps 200 leaves none of 6 steps with a codebook; use 2"):
        call(train_vq, f"--out {tmp_path / 'x'} {flags}")


def test_a_run_leaves_a_model_a_log_and_a_grid(vq_run):
    """The grid: training and validation images above their reconstructions, at the end of each evaluation."""
    assert {"config.json", "model.safetensors", "log.jsonl", "loss.png", "state"} <= {p.name for p in vq_run.iterdir()}
    assert [Image.open(vq_run / f"reconstructions-{step:06d}.png").width for step in (4, 8)] == [2 * 98 - 2] * 2
    keys = set().union(*read_log(vq_run / "log.jsonl"))
    assert {"loss", "psnr", "perplexity", "grad_norm", "lr", "images_per_s", "val_psnr", "val_ssim", "code_use"} <= keys


def test_dry_run_prints_settings_and_size_and_leaves_nothing(tmp_path, capsys):
    call(train_vq, f"--out {tmp_path / 'x'} --recipe dalle --dry_run")
    text = capsys.readouterr().out
    assert "--quantizer gumbel" in text and "1.55 M parameters, 8x8 codes per image" in text
    assert not (tmp_path / "x").exists()
