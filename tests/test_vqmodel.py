"""Tokenizers in diffusers' layout: codes and images as diffusers gives them, range, names, refusals, round trips."""

import json
from zlib import crc32

import pytest
import torch
from conftest import COMMON_FLAGS, VQ_FLAGS
from processes import call
from safetensors.torch import load_file, save_file
from untrained import make_vq

import sample
import train_prior
import train_vq
from minit2i import export
from minit2i.checkpoint import load_vq, read_config
from minit2i.vq import build_vq
from minit2i.vqmodel import WEIGHTS, copy_tokenizer, read_theirs, their_keys, tokenizer_config, write_vqmodel

D, AD, U, AU = "DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
THREE = dict(block_out_channels=[8, 12, 16], norm_num_groups=4, num_vq_embeddings=16, latent_channels=5)
CONFIGS = {
    "group": dict(down_block_types=[D, D, AD], up_block_types=[AU, U, U], layers_per_block=2, vq_embed_dim=3) | THREE,
    "spatial": dict(
        down_block_types=[D, AD], up_block_types=[AU, U], norm_type="spatial", block_out_channels=[32, 64],
        num_vq_embeddings=16, latent_channels=4, vq_embed_dim=4,
    ),
    "no mid": dict(down_block_types=[D, AD, D], up_block_types=[AU, U, AU], mid_block_add_attention=False) | THREE,
}  # fmt: skip


def values(key, shape):
    """A weight that is a function of its name: gains near 1, matrices that keep the variance."""
    n, fan_in = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    wave = torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) ** 1.1 + crc32(key.encode()) % 997).view(shape)
    if "embedding" in key:
        return 0.7 * wave.float()
    gain = len(shape) == 1 and "norm" in key and key.endswith("weight")
    return (1 + 0.3 * wave if gain else 0.3 * wave if len(shape) == 1 else 1.5 * wave / fan_in**0.5).float()


def picture():
    """An image (1, 3, 16, 24) in [-1, 1]."""
    return torch.sin(0.37 * torch.arange(3 * 16 * 24, dtype=torch.float64) ** 1.2).float().view(1, 3, 16, 24)


def write_folder(folder, config, older=False):
    """A folder as diffusers writes it; older: as it named attention once, with 1x1 convolutions."""
    config = {"_class_name": "VQModel", "_diffusers_version": "0.1", "sample_size": 32, "scaling_factor": 0.1} | config
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        own = build_vq(tokenizer_config(folder, "0,1")["model"]).state_dict()
    tensors = {name: values(name, own[key].shape) for key, name in their_keys(own, read_theirs(folder)).items()}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if older else {}
    for new, old in names.items():
        tensors = {k.replace(new, old): v[..., None, None] if f".{new}.weight" in k else v for k, v in tensors.items()}
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", {"format": "pt"})
    return folder


def load(folder, config, pixels="0,1", **how):
    copy_tokenizer(write_folder(folder, config, **how), folder / "ours", pixels)
    return load_vq(folder / "ours")


# --- as diffusers ---

STORED = {  # diffusers 0.42.1 for pixels 0,1: tensors, codes, and of the image mean, standard deviation, two pixels
    "group": (255, "8bccb66000 0b752565 696655", [-0.9797, 0.9499, -1.9371, -0.5427, -2.1258, -0.7514, -0.845, -1.4215]),
    "spatial": (
        219,
        "49ad9aaa99a7 477d7ddaa4dd 7dd7a4a4a47a f4a9afd47d28 dddffa429ada aa7aaaddfdff ea2ddd7a9aaa 42ddaddadaad",
        [-0.941, 1.2292, 0.7426, -1.1944, -2.2327, 0.3512, -1.1483, -1.1468],
    ),
    "no mid": (
        187, "ff8dbc5eccbf f37fbcff7533", [-0.8773, 0.8287, -0.1396, -0.8887, -2.3802, -1.2915, -0.495, -1.1337],
    ),
}  # fmt: skip


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_images_equal_those_that_diffusers_gave(name, older, tmp_path):
    """Each weight is a function of its name in diffusers, so a name that is mixed up changes the numbers."""
    vq = load(tmp_path / "x", CONFIGS[name], older=older)
    n, codes, numbers = STORED[name]
    assert len(load_file(tmp_path / "x" / f"{WEIGHTS}.safetensors")) == n
    found = vq.encode(picture())
    assert "".join(f"{code:x}" for code in found.flatten().tolist()) == codes.replace(" ", "")
    image = vq.to_image(vq.decode_latents(vq.quantizer.lookup(found).permute(0, 3, 1, 2)))[0].detach()
    seen = torch.stack([image.mean(), image.std(), *image[:, 3, 5], *image[:, 15, 23]])
    assert torch.allclose(seen, torch.tensor(numbers), atol=5e-4)


@pytest.mark.parametrize(
    "config, millions",
    [
        (dict(block_out_channels=[128, 256, 256, 512, 768], latent_channels=64, num_vq_embeddings=8192)
         | dict(down_block_types=[D] * 5, up_block_types=[U] * 5, mid_block_add_attention=False), 146.244675),
        (dict(block_out_channels=[128, 256, 256, 512], latent_channels=4, num_vq_embeddings=16384, norm_type="spatial")
         | dict(down_block_types=[D, D, D, AD], up_block_types=[AU, U, U, U]), 67.832495),
        (dict(block_out_channels=[128, 128, 256, 256, 512], latent_channels=256, num_vq_embeddings=16384)
         | dict(down_block_types=[D, D, D, D, AD], up_block_types=[AU, U, U, U, U]), 76.073859),
    ],
)  # fmt: skip
def test_published_shapes_have_the_parameters_that_diffusers_counts(config, millions, tmp_path):
    """aMUSEd's, Kandinsky's MoVQ, Taming's ImageNet f16; Taming's is our default shape."""
    config = {"_class_name": "VQModel", "layers_per_block": 2} | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = tokenizer_config(tmp_path, "0,1")["model"]
    with torch.device("meta"):
        assert sum(w.numel() for w in build_vq(settings).parameters()) == round(millions * 1e6)
        if "mid_block_add_attention" not in config and config["latent_channels"] == 256:
            plain = dict(backbone="vqgan", stride=16, ch=128, quantizer="st", n_codes=16384, code_dim=256)
            assert sum(w.numel() for w in build_vq(plain).parameters()) == round(millions * 1e6)


def test_missing_keys_mean_what_they_mean_in_diffusers(tmp_path):
    """32 groups, group norm, mid-block attention, vq_embed_dim = latent_channels; two sizes are ignored."""
    config = dict(block_out_channels=[32, 64], down_block_types=[D, D], up_block_types=[U, U])
    cfg = load(tmp_path / "x", config).cfg
    assert (cfg.backbone, cfg.norm_groups, cfg.attention, cfg.decoder_attention) == ("vqgan", 32, "mid", "")
    assert (cfg.code_dim, cfg.z_channels, cfg.n_codes, cfg.n_res, cfg.stride, cfg.ch_mult) == (3, 3, 256, 1, 2, "1,2")


def test_a_float32_tokenizer_leaves_autocast(tmp_path):
    """aMUSEd's config has force_upcast."""
    plain, careful = (load(tmp_path / str(i), CONFIGS["group"] | {"force_upcast": i}) for i in (False, True))
    exact = careful.latents(picture())
    with torch.autocast("cpu", torch.bfloat16):
        assert careful.latents(picture()).equal(exact) and not plain.latents(picture()).float().equal(exact)


# --- the range of the pixels ---


def test_the_range_is_part_of_the_converted_tokenizer(tmp_path):
    """The network of 0,1 sees (x + 1) / 2 and gives (x + 1) / 2; codes that are cached for one range are not another's."""
    unit, signed = (load(tmp_path / str(i), CONFIGS["no mid"], pixels) for i, pixels in enumerate(("0,1", "-1,1")))
    x = picture()
    assert torch.allclose(unit.latents(x), signed.latents((x + 1) / 2), atol=1e-5)
    z = torch.randn(1, 5, 4, 6)
    assert torch.allclose(unit.decoder(z), 2 * signed.decoder(z) - 1, atol=1e-5)
    assert unit.hash != signed.hash and unit.encode(x).ne(signed.encode(x)).any()


@pytest.mark.parametrize(
    "pixels, message",
    [("", "give --vq_range 0,1 .aMUSEd's tokenizer. or --vq_range -1,1 .VQ-Diffusion's"), ("1,0", "not two rising")]
    + [(bad, "is not two rising numbers; use 0,1 or -1,1") for bad in ("0", "a,b", "0..1", "1,1")],
)
def test_the_range_is_never_guessed(pixels, message, tmp_path):
    folder = write_folder(tmp_path / "x", CONFIGS["no mid"])
    with pytest.raises(ValueError, match=message):
        copy_tokenizer(folder, tmp_path / "y", pixels)
    assert not (tmp_path / "y").exists()


def test_a_range_for_a_tokenizer_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="knows its own: leave it out"):
        copy_tokenizer(make_vq(tmp_path / "x"), tmp_path / "y", "0,1")


# --- what cannot be read ---


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderKL"}, "holds diffusers' AutoencoderKL, which is no tokenizer with codes"),
        ({"down_block_types": [D, "CrossAttnDownBlock2D", D]}, "has down_block_types 'CrossAttnDownBlock2D'"),
        ({"up_block_types": [U, U, "UpBlock2D"]}, "has up_block_types 'UpBlock2D', which is not implemented"),
        ({"norm_type": "layer"}, "has norm_type 'layer', which is not implemented; known: .'group', 'spatial'."),
        ({"norm_type": "spatial"}, "has norm_num_groups 4 and spatial norms, which have 32"),
        ({"act_fn": "gelu"}, "has act_fn 'gelu'"),
        ({"in_channels": 4}, "has in_channels 4"),
        ({"block_out_channels": [8, 16]}, "differ in length"),
        (dict(block_out_channels=[8], down_block_types=[D], up_block_types=[U]), "cannot be read: stride 1 is not known"),
        ({"layers_per_block": 3}, "lacks .*resnets.2"),
        ({"layers_per_block": 1}, "holds decoder.up_blocks.0.attentions.2.group_norm.bias, which the VQModel of its config.json does not have"),
        ({"num_vq_embeddings": 17}, r"quantize.embedding.weight in .* is \(16, 5\), its config.json says \(17, 5\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_it_is(change, message, tmp_path):
    folder = write_folder(tmp_path / "x", CONFIGS["no mid"] | {"layers_per_block": 2})
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        copy_tokenizer(folder, tmp_path / "y", "0,1")
    assert not (tmp_path / "y").exists()


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "x", CONFIGS["no mid"])
    (folder / f"{WEIGHTS}.safetensors").rename(folder / f"{WEIGHTS}.bin")
    with pytest.raises(ValueError, match="in diffusion_pytorch_model.bin, a pickle, which can run code; save it again"):
        copy_tokenizer(folder, tmp_path / "y", "0,1")


def test_others_say_how_to_convert_it(tmp_path):
    folder = write_folder(tmp_path / "x", CONFIGS["no mid"])
    for use in (load_vq, lambda folder: call(train_vq, f"--data scenes:9 --init {folder} --out {tmp_path / 'y'}")):
        with pytest.raises(ValueError, match="holds diffusers' VQModel; python -m minit2i.export --model .*x --out X"):
            use(folder)


# --- there and back ---

OURS = [
    dict(backbone="vqgan", ch=32, n_res=2),
    dict(backbone="vqgan", ch=8, norm_groups=8, attention="none", quantizer="st", l2_norm=True, z_channels=6),
    dict(backbone="vqgan", ch=8, norm_groups=8, attention="4,mid", decoder_attention="2,8,mid", pixels="0,1"),
    dict(backbone="vqgan", decoder="movq", ch=32, ch_mult="2,1,3,1", norm_groups=32),
    dict(backbone="movq", ch=32, norm_groups=32),
]


@pytest.mark.parametrize("settings", OURS)
def test_a_round_trip_is_exact(settings, tmp_path):
    before = load_vq(make_vq(tmp_path / "ours", **settings))
    pixels = write_vqmodel(tmp_path / "ours", tmp_path / "theirs")
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == ["config.json", f"{WEIGHTS}.safetensors"]
    copy_tokenizer(tmp_path / "theirs", tmp_path / "back", pixels)
    after, x = load_vq(tmp_path / "back"), torch.rand(2, 3, 24, 32) * 2 - 1
    codes = before.encode(x)
    assert after.encode(x).equal(codes) and len(codes.unique()) > 3
    assert after.decode(codes).equal(before.decode(codes)) or settings.get("l2_norm")
    assert torch.allclose(after.decode(codes), before.decode(codes), atol=1e-5)
    with pytest.raises(ValueError, match="holds a model already"):
        write_vqmodel(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(backbone="vqvae"), "is a vqgan or a movq, in encoder and decoder"),
        (dict(backbone="vqgan", decoder="vqvae"), "is a vqgan or a movq, in encoder and decoder"),
        (dict(backbone="vqgan", quantizer="fsq", n_codes=240), "takes the nearest of its codes"),
        (dict(backbone="vqgan", output="logit_laplace"), "gives plain images"),
        (dict(backbone="vqgan", decoder_ch=16), "has a decoder of the encoder's size"),
        (dict(backbone="vqgan", decoder_n_res=2), "has a decoder of the encoder's size"),
        (dict(backbone="vqgan", decoder_attention="none"), "has a decoder of the encoder's size"),
        (dict(backbone="vqgan", norm_groups=16), r"as many groups in each norm; this tokenizer has 8, 16"),
        (dict(backbone="movq", ch=16), r"32 groups in each norm of a movq; this tokenizer has 4"),
        (dict(backbone="movq", ch=32, norm_groups=32, z_channels=5), "as many z_channels as code_dim"),
    ],
)
def test_what_a_vqmodel_cannot_be_is_not_written(settings, message, tmp_path):
    make_vq(tmp_path / "x", **settings)
    with pytest.raises(ValueError, match=message):
        write_vqmodel(tmp_path / "x", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_export_converts_both_ways(tmp_path, capsys):
    ours = make_vq(tmp_path / "ours", backbone="movq", ch=32, norm_groups=32)
    call(export, f"--model {ours} --layout diffusers --out {tmp_path / 'theirs'}")
    assert "its pixels are in -1,1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give --vq_range"):
        call(export, f"--model {tmp_path / 'theirs'} --out {tmp_path / 'back'}")
    call(export, f"--model {tmp_path / 'theirs'} --vq_range -1,1 --out {tmp_path / 'back'}")
    x = torch.rand(2, 3, 24, 32) * 2 - 1
    assert load_vq(tmp_path / "back").encode(x).equal(load_vq(ours).encode(x))
    call(export, f"--model {tmp_path / 'back'} --out {tmp_path / 'small'}")
    assert load_vq(tmp_path / "small").cfg.pixels == "-1,1"


# --- training on it ---


def test_a_prior_learns_the_codes_of_such_a_folder(images, tmp_path):
    """The run keeps its copy in our layout: sampling and resuming need to know nothing else."""
    folder, out = write_folder(tmp_path / "x", CONFIGS["spatial"]), tmp_path / "prior"
    flags = (
        f"--data {images} --vq {folder} --cache {tmp_path / 'cache'} {COMMON_FLAGS} --n_layer 1 --n_head 2 --n_embd 16"
    )
    flags = flags.replace("--image_size 32", "") + f" --text_len 8 --vocab_size 300 --out {out}"
    with pytest.raises(ValueError, match="give --vq_range"):
        call(train_prior, flags)
    with pytest.raises(ValueError, match="does not say the size of its images; give --image_size"):
        call(train_prior, f"{flags} --vq_range -1,1")
    call(train_prior, f"{flags} --vq_range 0,1 --image_size 16 --steps 2 --eval_every 2 --dry_run")
    assert not out.exists()
    call(train_prior, f"{flags} --vq_range 0,1 --image_size 16 --steps 2 --eval_every 2")
    kept = read_config(out / "vq")
    assert kept["model"]["backbone"] == "movq" and kept["model"]["pixels"] == "0,1"
    assert kept["data"]["image_size"] == "16" and read_config(out)["model"]["n_codes"] == 16
    call(train_prior, f"--resume --out {out} --steps 3")
    call(sample, f"--model {out} --prompt star --out {tmp_path / 'a.png'} --device cpu")
    assert (tmp_path / "a.png").exists()


def test_a_converted_tokenizer_trains_on(images, tmp_path):
    """--init goes on with all of it, or with a decoder of another kind."""
    load(tmp_path / "x", CONFIGS["group"], "0,1")
    common = f"--data {images} {VQ_FLAGS} --init {tmp_path / 'x/ours'} --eval_every 2 --steps 2"
    for part in ("--stride 8", "--ch 8", "--n_res 1", "--n_codes 32", "--code_dim 8"):
        common = common.replace(part, "")
    call(train_vq, f"{common} --out {tmp_path / 'all'}")
    call(train_vq, f"{common} --train decoder --decoder movq --decoder_attention none --out {tmp_path / 'decoder'}")
    a, b, x = load_vq(tmp_path / "x/ours"), load_vq(tmp_path / "decoder"), torch.rand(2, 3, 16, 24) * 2 - 1
    assert b.encode(x).equal(a.encode(x)) and load_vq(tmp_path / "all").cfg == a.cfg
