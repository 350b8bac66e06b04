"""Data: every kind of image file and of damage, sources, crops, order, arrays that are computed once."""

import io
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from processes import fork

from minit2i import data
from minit2i.collectives import rank_and_world
from minit2i.data import BadEntry, DataConfig, Folder, Images, Order, Scenes, Shards, Skipped
from minit2i.data import cached_array, collate, crop, open_rgb, open_source, parse_size, positions, read_text_file
from minit2i.data import split, step_batches
from minit2i.train import Processes, TrainConfig

GREEN = (0, 128, 0)


def png(im, **kw):
    buffer = io.BytesIO()
    im.save(buffer, kw.pop("format", "PNG"), **kw)
    return buffer.getvalue()


# --- images ---


def rgba():
    im = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    im.paste((0, 128, 0, 255), (0, 0, 4, 8))
    return png(im)


def palette_with_transparency():
    im = Image.new("P", (8, 8), 0)
    im.putpalette([10, 20, 30, 0, 128, 0])
    im.paste(1, (0, 0, 4, 8))
    return png(im, transparency=0)


@pytest.mark.parametrize("make", [rgba, palette_with_transparency])
def test_transparency_is_laid_on_white(make):
    im = open_rgb(make())
    assert im.mode == "RGB" and im.getpixel((1, 1)) == GREEN and im.getpixel((6, 6)) == (255, 255, 255)


def test_sixteen_bit_gray_keeps_its_middle():
    """Pillow's own convert('RGB') clips at 255, which makes any 16-bit image white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    grays = np.asarray(open_rgb(png(Image.fromarray(ramp))))[..., 0]
    assert np.abs(grays - ramp / 257.0).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "F"])
def test_every_mode_becomes_rgb(mode):
    im = Image.new("RGB", (8, 6), (200, 200, 200)).convert(mode)
    out = open_rgb(png(im, format="TIFF" if mode in ("CMYK", "YCbCr", "F") else "PNG"))
    assert out.mode == "RGB" and out.size == (8, 6)
    assert mode in ("1", "P") or all(abs(c - 200) <= 3 for c in out.getpixel((4, 3)))


def test_exif_orientation_is_applied():
    im = Image.new("RGB", (8, 4), "white")
    im.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = open_rgb(png(im, format="JPEG", exif=exif, quality=95))
    assert out.size == (4, 8) and out.getpixel((2, 1))[0] < 40 and out.getpixel((2, 6))[0] > 215


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (12, 6)])
def test_crop_sizes_and_range(size):
    for im in (Image.new("RGB", (1, 1), "red"), Image.new("RGB", (300, 7), "red"), Image.new("RGB", (7, 300), "red")):
        for rng in (None, np.random.default_rng(0)):
            x = crop(im, size, rng=rng)
            assert (
                x.shape == (3, *size)
                and torch.allclose(x[0], torch.ones(size))
                and torch.allclose(x[1], -torch.ones(size))
            )


def test_crop_is_central_without_rng_and_never_mirrors_unasked():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (16, 1, 3))
    im = Image.fromarray(ramp)
    x = crop(im, (16, 16))
    assert abs(float(x.mean()) - (4 * 31.5 / 127.5 - 1)) < 0.02
    lefts = set()
    for k in range(30):
        row = crop(im, (16, 16), rng=np.random.default_rng(k))[0, 0]
        assert (row.diff() > 0).all()
        lefts.add(float(row[0]))
    assert len(lefts) > 10
    mirrored = [
        bool((crop(im, (16, 16), flip=True, rng=np.random.default_rng(k))[0, 0].diff() < 0).all()) for k in range(30)
    ]
    assert any(mirrored) and not all(mirrored)


# --- damage ---


def damaged_folder(root):
    """A folder with every kind of damage -> expected {key: reason}, keys that are good."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    bad, good = {}, []

    def add(name, data, caption="an image", reason=None):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
        if reason:
            bad[name] = reason
        else:
            good.append(name)

    jpeg, whole = png(noise, format="JPEG"), png(noise)
    add("truncated.jpg", jpeg[: len(jpeg) // 2], reason="damaged image")
    add("truncated.png", whole[: len(whole) // 2], reason="damaged image")
    add("header_only.png", whole[:20], reason="damaged image")
    add("zero.png", b"", reason="empty file")
    add("zero.jpg", b"", reason="empty file")
    add("text.png", b"this is not an image", reason="not an image")
    add("html.jpg", b"<html>404</html>", reason="not an image")
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2  # 40,000 x 40,000 in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    add("bomb.png", bytes(bomb), reason="more than 100 megapixels")
    add("no_caption.png", whole, caption=None, reason="no caption file")
    add("empty_caption.png", whole, caption="", reason="empty caption")
    add("latin1_caption.png", whole, caption="caf\u00e9".encode("latin-1"), reason="caption is not UTF-8")
    add("blank_caption.png", whole, caption=" \n\t\n", reason="empty caption")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 255
    add("bit_flip.png", bytes(flipped), reason="damaged image")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "dangling.txt").write_text("a link to nothing")
    bad["dangling.png"] = "missing file"

    add("long_caption.png", whole, caption="very " * 2000 + "long")
    add("emoji_caption.png", whole, caption="\U0001f600 smile \U0001f469\u200d\U0001f680")
    add("rtl_caption.png", whole, caption="\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627")
    add("bom_caption.png", whole, caption=b"\xef\xbb\xbfa byte order mark")
    add("utf16_caption.png", whole, caption="caf\u00e9".encode("utf-16"))
    add("nul_caption.png", whole, caption="zero \0 byte")
    add("crlf_caption.png", whole, caption="one\r\ntwo\r\n")
    add("one_pixel.png", png(Image.new("RGB", (1, 1), "blue")))
    add("thin.png", png(Image.new("RGB", (2000, 1), "blue")))
    add("animated.gif", png(noise, format="GIF", save_all=True, append_images=[Image.new("RGB", (40, 40))]))
    add("gray16.png", png(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)))
    add("palette.png", png(noise.convert("P")))
    add("gray_alpha.png", png(noise.convert("LA")))
    add("cmyk.jpg", png(noise.convert("CMYK"), format="JPEG"))
    add("upper.PNG", whole)
    add("jpeg_named.png", jpeg)
    add("sub/deep/er.webp", png(noise, format="WEBP"))
    add("sp ace \u00fc.png", whole)
    add(".hidden.png", whole)
    os.symlink(root, root / "sub" / "loop")  # a folder that contains itself
    (root / "orphan.txt").write_text("no image beside me")
    (root / "notes.md").write_text("not an entry")
    (root / "folder.png").mkdir()
    return bad, good


def test_thirty_kinds_of_damage(tmp_path):
    """Each bad entry is skipped once with its reason, each good one is used, nothing stops the run."""
    bad, good = damaged_folder(tmp_path)
    source = Folder(tmp_path)
    assert sorted(source.key(i) for i in range(len(source))) == sorted([*bad, *good])
    images = Images(source, np.arange(len(source)), DataConfig(data=str(tmp_path), image_size="16"), seed=0)
    said = []
    skipped = Skipped(said.append)
    for first in range(0, 2 * len(source), 7):
        batch, captions, skips = collate([images[p] for p in range(first, first + 7)])
        assert batch.shape == (7, 3, 16, 16) and batch.isfinite().all() and all(captions)
        skipped.add(skips)
    assert skipped.why == bad and len(said) == len(bad)
    n = sum(reason == "damaged image" for reason in bad.values())
    assert str(skipped).startswith(f"skipped {len(bad)} entries (1 caption is not UTF-8, {n} damaged image, ")


def test_none_usable_is_a_clear_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("a")
    images = Images(Folder(tmp_path), np.arange(1), DataConfig(image_size="16"), seed=0)
    with pytest.raises(ValueError, match="none of the 1 entries can be used .*not an image"):
        images[0]


@pytest.mark.parametrize("spec, message", [("nowhere", "neither a folder nor"), ("{tmp}", "no images")])
def test_nothing_there_is_a_clear_error(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec.replace("{tmp}", str(tmp_path)), DataConfig())


def test_text_in_any_common_encoding(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("ein gr\u00fcner Kreis\n\u2606".encode(encoding))
        assert read_text_file(path) == "ein gr\u00fcner Kreis\n\u2606"
    path.write_bytes("plain\ngr\u00fcner\n".encode("latin-1"))
    for bad, message in (
        (path, "is not UTF-8 .line 2.; save it as UTF-8"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text_file(bad)


# --- sources and splits ---


def write_shards(root, n=30, shards=3):
    """img2dataset's layout: key.jpg, key.txt, key.json."""
    for s in range(shards):
        with tarfile.open(root / f"{s:05d}.tar", "w") as tar:
            for k in range(s, n, shards):
                im = Image.new("RGB", (20, 20), (8 * k, 0, 0))
                for ext, data in (
                    ("jpg", png(im, format="JPEG", quality=95)),
                    ("txt", f"number {k}".encode()),
                    ("json", json.dumps({"caption": "wrong"}).encode()),
                ):
                    info = tarfile.TarInfo(f"{k:09d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("spec", ["{00000..00002}.tar", "*.tar", "0000[0-2].tar"])
def test_shards_are_read_in_place(tmp_path, spec):
    write_shards(tmp_path)
    cfg = DataConfig(data=str(tmp_path / spec), image_size="16")
    source = open_source(cfg.data, cfg)
    assert len(source) == 30
    images = Images(source, np.arange(30), cfg)
    for i in range(30):
        image, caption, _ = images[i]
        k = int(caption.split()[1])
        assert abs(float(image[0].mean()) - (8 * k / 127.5 - 1)) < 0.03
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_cut_shard_gives_what_is_before_the_cut(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    source = Shards([str(tmp_path / f"{s:05d}.tar") for s in range(3)])
    images = Images(source, np.arange(len(source)), DataConfig(image_size="16"), seed=0)
    _, _, skips = collate([images[p] for p in range(2 * len(source))])
    used = {images[p][1] for p in range(2 * len(source))}
    assert source.damaged and "00001.tar" in source.damaged[0][0]
    assert 20 < len(used) < 30 and len(source) - len({k for k, _ in skips}) == len(used)


def test_split_is_stable_and_disjoint(tmp_path):
    write_shards(tmp_path)
    cfg = DataConfig(data=str(tmp_path / "*.tar"), val_data="0.3")
    (source, train), (_, val) = split(cfg)
    assert not set(train) & set(val) and len(train) + len(val) == 30 and 2 <= len(val) <= 18
    keys = {source.key(i) for i in val}
    os.remove(tmp_path / "00002.tar")  # fewer images do not move the others across
    (source, _), (_, val) = split(cfg)
    assert {source.key(i) for i in val} == {k for k in keys if k in {source.key(i) for i in range(len(source))}}


def test_several_captions_are_sampled_in_turn(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    images = Images(Folder(tmp_path), np.arange(1), DataConfig(image_size="8"), seed=0)
    assert {images[p][1] for p in range(40)} == {"one", "two", "three"}


def test_validation_entries_come_from_a_fraction_or_from_another_source(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a.png")
    (source, train), (val_source, val) = split(DataConfig(data="scenes:40", val_data=str(tmp_path / "val")))
    assert len(train) == 40 and isinstance(source, Scenes) and isinstance(val_source, Folder) and len(val) == 1
    (_, train), (_, val) = split(DataConfig(data="scenes:40", val_data="0"))
    assert (len(train), len(val)) == (39, 1), "one is kept even so"
    for fraction in ("1", "2", "-0.1", "nan"):
        with pytest.raises(ValueError, match=r"val_data .* is not a fraction in \[0, 1\)"):
            split(DataConfig(val_data=fraction))
    with pytest.raises(ValueError, match="neither a folder nor a tar shard"):
        split(DataConfig(val_data="nowhere"))


def test_scenes_take_their_number_from_the_flag():
    cfg = DataConfig(image_size="16x24")
    assert len(open_source("scenes:7", cfg)) == 7 and len(open_source("scenes", cfg)) == data.N_SCENES
    assert Images(open_source("scenes:7", cfg), np.arange(7), cfg)[3][0].shape == (3, 16, 24)
    with pytest.raises(ValueError, match="scenes:0 is neither"):
        open_source("scenes:0", cfg)


# --- order ---


def test_order_visits_every_entry_once_an_epoch():
    order = Order(np.arange(5, 25), seed=1)
    epochs = [[order[p] for p in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(e) == list(range(5, 25)) for e in epochs) and epochs[0] != epochs[1]
    again = Order(np.arange(5, 25), seed=1)
    assert [again[p] for p in (47, 3, 20)] == [epochs[2][7], epochs[0][3], epochs[1][0]]


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_micro_batches_divide_the_same_batches(world, accum):
    batches = {}
    for rank in range(world):
        parts = list(positions(3, TrainConfig(out="", steps=6, batch_size=8, accum=accum), rank, world))
        assert len(parts) == 3 * accum
        for k, part in enumerate(parts):
            batches.setdefault(3 + k // accum, []).extend(part)
    assert {s: sorted(b) for s, b in batches.items()} == {s: list(range(8 * s, 8 * s + 8)) for s in (3, 4, 5)}


def test_workers_do_not_hear_signals_to_the_trainers_group():
    """A Ctrl-C that ends the workers would leave the trainer without the batches that it needs before it can stop."""

    class Groups(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return os.getpgrp()

    cfg = TrainConfig(out="", steps=1, batch_size=2)
    (part,) = next(step_batches(Groups(), cfg, Processes("cpu"), 0, 1, list))
    assert len(part) == 2 and os.getpgrp() not in part


@pytest.mark.parametrize("size, expected", [("64", (64, 64)), ("96x64", (96, 64))])
def test_parse_size(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "0", "64x", "64x0", "-8", "6.4", "64x64x3"])
def test_parse_size_refuses(size):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_size(size)


def test_an_enormous_image_is_refused_by_its_header(tmp_path):
    """A terabyte that says it has 40,000 x 40,000 pixels: no memory would hold the file."""
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    path = tmp_path / "bomb.png"
    path.write_bytes(bytes(bomb))
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(BadEntry, match="more than 100 megapixels"):
        open_rgb(path)


# --- arrays that are computed once ---


def squares(array, rows):
    for r in rows:
        array[r] = [r * r, rank_and_world()[0]]


def test_a_cached_array_is_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "squares.npy"
    array = cached_array(path, (5, 2), np.float32, squares)
    assert array[:, 0].tolist() == [0, 1, 4, 9, 16] and not array.flags.writeable
    assert cached_array(path, (5, 2), np.float32, None)[4, 0] == 16
    assert os.listdir(path.parent) == ["squares.npy"]

    def fails(array, rows):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_array(tmp_path / "other.npy", (5, 2), np.float32, fails)
    assert not (tmp_path / "other.npy").exists()


def shared(path):
    Processes("cpu")
    return np.array(cached_array(path, (5, 2), np.float32, squares))


def test_processes_share_the_work_on_a_cached_array(tmp_path):
    array = fork(2, shared, tmp_path / "a.npy")
    assert array[:, 0].tolist() == [0, 1, 4, 9, 16] and array[:, 1].tolist() == [0, 0, 1, 1, 1]
