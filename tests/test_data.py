"""Data: every kind of picture file and of damage, sources, crops, order, text."""

import io
import json
import os
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minit2i.data import (
    BadEntry,
    DataConfig,
    Folder,
    Order,
    Pictures,
    Shards,
    Skipped,
    StepSampler,
    collate,
    crop,
    open_rgb,
    open_source,
    parse_size,
    split,
    step_batches,
)
from minit2i.tokens import CodeCache, Coded, Crops, Text
from minit2i.train import Processes, TrainConfig

GREEN = (0, 128, 0)


def png(im, **kw):
    buffer = io.BytesIO()
    im.save(buffer, kw.pop("format", "PNG"), **kw)
    return buffer.getvalue()


# --- pictures ---


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
    """Pillow's own convert('RGB') clips at 255, which makes any 16-bit picture white."""
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

    def add(name, data, caption="a picture", reason=None):
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
    add("truncated.jpg", jpeg[: len(jpeg) // 2], reason="damaged picture")
    add("truncated.png", whole[: len(whole) // 2], reason="damaged picture")
    add("header_only.png", whole[:20], reason="damaged picture")
    add("zero.png", b"", reason="empty file")
    add("zero.jpg", b"", reason="empty file")
    add("text.png", b"this is no picture", reason="not a picture")
    add("html.jpg", b"<html>404</html>", reason="not a picture")
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2  # 40,000 x 40,000 in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    add("bomb.png", bytes(bomb), reason="more than 100 megapixels")
    add("no_caption.png", whole, caption=None, reason="no caption file")
    add("empty_caption.png", whole, caption="", reason="empty caption")
    add("blank_caption.png", whole, caption=" \n\t\n", reason="empty caption")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 255
    add("bit_flip.png", bytes(flipped), reason="damaged picture")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "dangling.txt").write_text("a link to nothing")
    bad["dangling.png"] = "missing file"

    add("long_caption.png", whole, caption="very " * 2000 + "long")
    add("emoji_caption.png", whole, caption="\U0001f600 smile \U0001f469\u200d\U0001f680")
    add("rtl_caption.png", whole, caption="\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627")
    add("latin1_caption.png", whole, caption="caf\u00e9".encode("latin-1"))
    add("bom_caption.png", whole, caption=b"\xef\xbb\xbfa byte order mark")
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
    (root / "orphan.txt").write_text("no picture beside me")
    (root / "notes.md").write_text("not an entry")
    (root / "folder.png").mkdir()
    return bad, good


def test_thirty_kinds_of_damage(tmp_path):
    """Each bad entry is skipped once with its reason, each good one is used, nothing stops the run."""
    bad, good = damaged_folder(tmp_path)
    source = Folder(tmp_path)
    assert sorted(source.key(i) for i in range(len(source))) == sorted([*bad, *good])
    pictures = Pictures(source, np.arange(len(source)), DataConfig(data=str(tmp_path), size="16"), seed=0)
    said = []
    skipped = Skipped(said.append)
    for first in range(0, 2 * len(source), 7):
        images, captions, skips = collate([pictures[p] for p in range(first, first + 7)])
        assert images.shape == (7, 3, 16, 16) and images.isfinite().all() and all(captions)
        skipped.add(skips)
    assert skipped.why == bad and len(said) == len(bad)
    assert skipped.counts()["damaged picture"] == sum(r == "damaged picture" for r in bad.values())


def test_none_usable_is_a_clear_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("a")
    pictures = Pictures(Folder(tmp_path), np.arange(1), DataConfig(size="16"), seed=0)
    with pytest.raises(ValueError, match="none of the 1 entries can be used .*not a picture"):
        pictures[0]


@pytest.mark.parametrize("spec, message", [("nowhere", "neither a folder nor"), ("{tmp}", "no pictures")])
def test_nothing_there_is_a_clear_error(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec.replace("{tmp}", str(tmp_path)), DataConfig())


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
    cfg = DataConfig(data=str(tmp_path / spec), size="16")
    source = open_source(cfg.data, cfg)
    assert len(source) == 30
    pictures = Pictures(source, np.arange(30), cfg)
    for i in range(30):
        image, caption, _ = pictures[i]
        k = int(caption.split()[1])
        assert abs(float(image[0].mean()) - (8 * k / 127.5 - 1)) < 0.03
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_cut_shard_gives_what_is_before_the_cut(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    source = Shards([str(tmp_path / f"{s:05d}.tar") for s in range(3)])
    pictures = Pictures(source, np.arange(len(source)), DataConfig(size="16"), seed=0)
    _, _, skips = collate([pictures[p] for p in range(2 * len(source))])
    used = {pictures[p][1] for p in range(2 * len(source))}
    assert source.damaged and "00001.tar" in source.damaged[0][0]
    assert 20 < len(used) < 30 and len(source) - len({k for k, _ in skips}) == len(used)


def test_split_is_stable_and_disjoint(tmp_path):
    write_shards(tmp_path)
    cfg = DataConfig(data=str(tmp_path / "*.tar"), val_fraction=0.3)
    (source, train), (_, val) = split(cfg)
    assert not set(train) & set(val) and len(train) + len(val) == 30 and 2 <= len(val) <= 18
    keys = {source.key(i) for i in val}
    os.remove(tmp_path / "00002.tar")  # fewer pictures do not move the others across
    (source, _), (_, val) = split(cfg)
    assert {source.key(i) for i in val} == {k for k in keys if k in {source.key(i) for i in range(len(source))}}


def test_several_captions_are_drawn_in_turn(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    pictures = Pictures(Folder(tmp_path), np.arange(1), DataConfig(size="8"), seed=0)
    assert {pictures[p][1] for p in range(40)} == {"one", "two", "three"}


# --- order ---


def test_order_visits_every_entry_once_an_epoch():
    order = Order(np.arange(5, 25), seed=1)
    epochs = [[order[p] for p in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(e) == list(range(5, 25)) for e in epochs) and epochs[0] != epochs[1]
    again = Order(np.arange(5, 25), seed=1)
    assert [again[p] for p in (47, 3, 20)] == [epochs[2][7], epochs[0][3], epochs[1][0]]


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_parts_share_out_the_same_batches(world, accum):
    batches = {}
    for rank in range(world):
        parts = list(StepSampler(3, 6, 8, accum, rank, world))
        assert len(parts) == len(StepSampler(3, 6, 8, accum, rank, world)) == 3 * accum
        for k, part in enumerate(parts):
            batches.setdefault(3 + k // accum, []).extend(part)
    assert {s: sorted(b) for s, b in batches.items()} == {s: list(range(8 * s, 8 * s + 8)) for s in (3, 4, 5)}


def test_workers_do_not_hear_signals_to_the_trainers_group():
    """A Ctrl-C that ends the workers would leave the trainer without the batches that it still needs to stop in order."""

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


# --- text ---

CAPTIONS = [
    "a red circle above a blue square",
    "Two Green triangles",
    "three pink stars on white",
    "a cat \u2014 caf\u00e9",
] * 5


@pytest.fixture(scope="module")
def text():
    return Text(Text.train(CAPTIONS, 400), 24)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "RED \uff23ircle",
        "\U0001f469\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627",
        "zebra & 42",
        "\n",
    ],
)
def test_any_prompt_has_ids_and_comes_back(text, prompt):
    ids = text.encode(prompt)
    assert ids.shape == (24,) and ids[0] == text.sp.bos_id()
    assert text.sp.unk_id() not in ids.tolist()
    expected = text.sp.normalize(prompt).replace("\u2581", " ").strip()
    assert text.decode(ids) == expected or len(text.pieces(prompt)) > 22


def test_a_damaged_text_model_is_a_clear_error(text):
    for proto in (b"", text.proto[:99]):
        with pytest.raises(ValueError, match="no SentencePiece model"):
            Text(proto, 8)


def test_case_and_width_do_not_matter(text):
    assert text.encode("A RED \uff43ircle").equal(text.encode("a red circle"))


def test_each_text_position_has_its_own_pad(text):
    ids = text.encode("red")
    end = ids.tolist().index(text.sp.eos_id())
    assert ids[end + 1 :].tolist() == [text.n_vocab + t for t in range(end + 1, 24)]


def test_long_captions_are_cut_and_counted(text):
    before = text.n_cut
    ids = text.encode("square " * 100)
    assert len(ids) == 24 and ids[-1] == text.sp.eos_id() and text.n_cut == before + 1
    text.encode("square")
    assert text.n_cut == before + 1


def test_bpe_dropout_spells_the_same_text_in_other_pieces(text):
    caption = "a red circle above a blue square \u2014 caf\u00e9 \U0001f600"
    plain = text.pieces(caption)
    own = text.pieces(caption, 1e-12, np.random.default_rng(0))
    assert own == plain, "without dropout our merging must be SentencePiece's"
    drawn = [text.pieces(caption, 0.3, np.random.default_rng(k)) for k in range(10)]
    assert all(text.sp.decode(ids) == text.sp.decode(plain) for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 5 and all(len(ids) >= len(plain) for ids in drawn)
    letters = text.pieces("red", 1.0, np.random.default_rng(0))
    assert text.sp.id_to_piece(letters) == ["\u2581", "r", "e", "d"]


# --- code cache ---


def test_code_cache_skips_bad_entries_and_depends_on_its_inputs(tmp_path, text):
    bad, good = damaged_folder(tmp_path / "pictures")
    source, cfg = Folder(tmp_path / "pictures"), DataConfig(size="16", resize=24, workers=0)
    indices = np.arange(len(source))

    def encode(images):  # 4x4 codes: mean red of each 4x4 patch
        return ((torch.nn.functional.avg_pool2d(images[:, 0], 4) + 1) * 7).long()

    def digest(cfg=cfg, **kw):
        return Crops(source, indices, cfg, **{"crops": 3} | kw).digest()

    folder = tmp_path / "cache" / digest()
    CodeCache.build(folder, Crops(source, indices, cfg, 3), encode, (4, 4), 16, Processes("cpu"))
    cache = CodeCache(folder)
    assert cache.codes.shape == (len(source), 3, 4, 4) and dict(cache.skipped) == bad
    assert cache.ok.tolist() == [source.key(i) in good for i in indices]
    crops = cache.codes[[source.key(i) for i in indices].index("long_caption.png")]
    assert not (crops[0] == crops[1]).all()
    assert os.listdir(tmp_path / "cache") == [folder.name]
    before = digest()
    assert len({before, digest(crops=2), digest(seed=1), digest(cfg=replace(cfg, size="32"))}) == 4
    os.utime(tmp_path / "pictures" / "upper.PNG", (1, 1))
    assert digest() != before

    coded = Coded(source, indices, cache, text, seed=0, bpe_dropout=0.1, cond_drop=0.5)
    samples = [coded[p] for p in range(60)]
    empty = text.encode("")
    dropped = sum(ids.equal(empty) for ids, *_ in samples)
    assert 15 < dropped < 45 and sum(cut for *_, cut in samples) >= 1
    assert samples[7][0].equal(coded[7][0]) and samples[7][1].shape == (16,)


def test_an_enormous_picture_is_refused_by_its_header(tmp_path):
    """A terabyte that says it has 40,000 x 40,000 pixels: no memory would hold the file."""
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    path = tmp_path / "bomb.png"
    path.write_bytes(bytes(bomb))
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(BadEntry, match="more than 100 megapixels"):
        open_rgb(path)
