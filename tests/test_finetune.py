"""Finetuning: decoders and upsamplers trained afterwards, on codes that stay; a prior's new words and new schedule."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VQ_FLAGS
from PIL import Image
from processes import call
from safetensors.torch import load_file

import train_prior
import train_vq
from minit2i.checkpoint import load_vq, read_config, save_model
from minit2i.plot import read_log
from minit2i.sample import Pipeline
from minit2i.tokens import Text

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
    changed = dict(decoder="movq", decoder_ch=16, decoder_n_res=2)
    assert asdict(after.cfg).items() >= (asdict(before.cfg) | changed).items()
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
        ("--init nowhere --train decoder", "--init nowhere is not a checkpoint folder"),
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


# --- new words ---

OLD = ["three green triangles above a red square", "a blue star", "a large red circle"]
NEW = ["the dragon, an \u2606emoji\u2606", "THE DRAGON", "\u2606 emoji dragons", "the dragon"]


def test_a_grown_text_model_keeps_all_other_ids():
    """Words of several pieces and characters that occur twice get ids; 'three' keeps its own beside a new 'the'."""
    proto = Text.train(OLD * 3, 290)
    old, grown = Text(proto, 48), Text(Text.grow(proto, NEW, 400), 48)
    added = [grown.sp.id_to_piece(i) for i in range(old.n_vocab, grown.n_vocab)]
    assert {"\u2581dragon", "\u2581the", "\u2606", "j"} <= {*added}
    assert "\u2581dragons" not in added, "it occurs once"
    assert [old.sp.id_to_piece(i) for i in range(old.n_vocab)] == [grown.sp.id_to_piece(i) for i in range(old.n_vocab)]
    for caption in [*OLD, "there three dragonflies", ""]:
        assert grown.pieces(caption) == old.pieces(caption) and grown.decode(grown.encode(caption)) == caption
    the, dragon = (grown.sp.piece_to_id(f"\u2581{word}") for word in ("the", "dragon"))
    assert grown.pieces("The  DRAGON") == [the, dragon]
    assert grown.pieces("a dragon, red")[1] == dragon and grown.decode(grown.encode("a dragon, red")) == "a dragon, red"
    drawn = [grown.pieces("the dragon", 0.5, np.random.default_rng(seed)) for seed in range(40)]
    whole = sum(ids == [the, dragon] for ids in drawn)
    assert 0 < whole < 40 and {grown.sp.decode(ids) for ids in drawn} == {"the dragon"}, "dropout skips new words, too"
    again = Text(Text.grow(grown.proto, ["a unicorn"] * 2, 400), 24)
    assert again.added == grown.added | {"\u2581unicorn": again.sp.piece_to_id("\u2581unicorn")}
    assert Text(Text.grow(proto, NEW, old.n_vocab + 1), 24).n_vocab == old.n_vocab + 1
    with pytest.raises(ValueError, match="has .* tokens already; use a larger --vocab_size"):
        Text.grow(proto, NEW, old.n_vocab)


def test_a_prior_learns_new_words_and_keeps_old_captions_logits(prior_run, vq_run, images, tmp_path):
    """Every logit of an old caption and its codes is the same to the bit; the new ids have logits of their own."""
    shutil.copytree(images, tmp_path / "images")
    for path in (tmp_path / "images").glob("*.txt"):
        path.write_text("the dragon of " + path.read_text())
    flags = f"{QUICK} --warmup 0 --lr 1e-30 --weight_decay 0 --vq {vq_run} --cache {tmp_path / 'cache'}"
    flags += f" --data {tmp_path / 'images'} --init {prior_run} --out {tmp_path / 'grown'}"
    with pytest.raises(ValueError, match="--vocab_size 360: the text model is that of --init .*; leave it out, or add"):
        call(train_prior, f"{flags} --vocab_size 360")
    call(train_prior, f"{flags} --vocab_size 360 --grow_vocab")
    call(train_prior, f"--resume --out {tmp_path / 'grown'} --steps 4")
    before, after = Pipeline(prior_run), Pipeline(tmp_path / "grown")
    n, n_new = before.text.n_vocab, after.text.n_vocab - before.text.n_vocab
    dragon = after.text.sp.piece_to_id("\u2581dragon")
    assert n_new > 0 and dragon in after.text.pieces("the dragon")
    for name in ("embedding.weight", "text_head.weight"):  # a new word starts as the mean of its pieces
        old, new = (p.model.state_dict()[name] for p in (before, after))
        assert torch.allclose(new[dragon], old[before.text.pieces("dragon")].mean(0), atol=1e-6)
    codes = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(0))
    for caption in ("zigzag ponies", "my 7 owls", ""):
        old, new = (p.model.logits({"text": p.encode_prompts([caption]), "codes": codes}) for p in (before, after))
        assert new[0][..., :n].equal(old[0]) and new[1].equal(old[1]) and new[0].shape[-1] == n + n_new


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--grow_vocab", "--grow_vocab extends the text model of another run: it needs --init"),
        ("--grow_vocab --init PRIOR --vocab_size 300", "tokens already; use a larger --vocab_size"),
        (
            "--init PRIOR --n_layer 3",
            "n_layer is 3, there 2; .* of .* tensors differ: blocks.2.attn.* is .*, there missing$",
        ),
        ("--init VQ", "--init .* holds a run of the other stage"),
    ],
)
def test_what_a_prior_cannot_start_from_is_said_in_one_line(flags, message, prior_run, vq_run, images, tmp_path):
    flags = flags.replace("PRIOR", str(prior_run)).replace("VQ", str(vq_run))
    with pytest.raises(ValueError, match=message) as e:
        call(train_prior, f"{QUICK} --data {images} --vq {vq_run} --cache {tmp_path} --out {tmp_path / 'x'} {flags}")
    assert len(str(e.value)) < 500 and "\n" not in str(e.value)


# --- a new schedule ---


@pytest.mark.parametrize("which", ["vq", "prior"])
def test_a_schedule_starts_anew_and_goes_on_after_a_second_resume(
    which, vq_run, prior_run, tmp_path, capsys, monkeypatch
):
    script, folder = {"vq": (train_vq, vq_run), "prior": (train_prior, prior_run)}[which]
    out, flags = shutil.copytree(folder, tmp_path / "run"), "--resume --eval_every 99 --warmup 2"

    def rates():
        return [r["lr"] for r in read_log(out / "log.jsonl") if "loss" in r][8:]

    call(script, f"{flags} --out {shutil.copytree(folder, tmp_path / 'stretched')} --steps 9")
    assert "; --restart_schedule would start them here" in capsys.readouterr().out
    call(script, f"{flags} --out {out} --steps 14 --restart_schedule")
    lr = read_config(out)["train"]["lr"]
    assert (
        f"goes on at {lr / 2:.3g}, not at {lr / 20:.3g}: warm-up and cosine take steps 8 to 14"
        in capsys.readouterr().out
    )
    restarted = rates()
    assert restarted[:2] == [lr / 2, lr] and restarted == sorted(restarted[:2]) + sorted(restarted[2:], reverse=True)
    saved = read_config(out)["train"]
    assert saved["schedule_start"] == 8 and saved["restart_schedule"] is False
    (out / "state" / "resume.safetensors").write_bytes((folder / "state" / "resume.safetensors").read_bytes())
    call(script, f"--resume --out {out}")  # as if it had been killed before its first save
    assert rates() == restarted and "the learning rate goes on" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun repeats a command whose workers died
    call(script, f"{flags} --out {out} --steps 14 --restart_schedule")
    assert read_config(out)["train"]["schedule_start"] == 8
    capsys.readouterr()
    call(script, f"--resume --out {out} --steps 3")
    assert "is at step 14 already: --steps 3 leaves nothing to do" in capsys.readouterr().out
