"""Captioned pictures: where they come from, how they are cropped, how captions become tokens.

A source knows its entries by number: `key(i)`, `picture(i) -> PIL image`, `captions(i) -> [str]`.
`Pictures` turns a source into the (image tensor, caption) samples of stage 1; `CodeCache` and
`Coded` into the (text ids, codes) samples of stage 2.  Every sample is a pure function of
(seed, position), so that resuming, more workers or more processes change nothing.

Shapes: B batch, T text length, H W picture, h w code grid, N = h*w.
"""

import glob
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from minit2i.scenes import caption, render, scene_at

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb; a 50-megapixel photograph passes


class BadEntry(Exception):
    """An entry that cannot be used; the message says why in a few words."""


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are cropped; both scripts have these flags."""

    data: Annotated[str, "'scenes', a folder, or tar shards (path, glob or {00000..00041})"] = "scenes"
    val_data: Annotated[str, "validation pictures, given like --data; empty: a part of --data"] = ""
    val_fraction: Annotated[float, "part of --data kept for validation, chosen by a hash of the key"] = 0.02
    size: Annotated[str, "picture size in pixels: 64, or HEIGHTxWIDTH as 96x64"] = "64"
    resize: Annotated[int, "short side after resizing, before the crop; 0: just large enough"] = 0
    flip: Annotated[bool, "mirror half of the training pictures (wrong for captions with 'left of')"] = False
    captions: Annotated[bool, "entries need a caption; train_vq can do with --no-captions"] = True
    n_scenes: Annotated[int, "how many different scenes '--data scenes' draws"] = 200_000
    workers: Annotated[int, "loader processes"] = 2


def parse_size(size):
    """'64' -> (64, 64), '96x64' -> (96, 64) as (height, width); ValueError otherwise."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise ValueError(f"size {size!r} is not a number of pixels; use 64, or HEIGHTxWIDTH as 96x64")
    h, *w = map(int, size.split("x"))
    return h, w[0] if w else h


# --- pictures ----------------------------------------------------------------------------------------


def open_rgb(file, near=None):
    """Any picture file (path or bytes) -> PIL RGB image, upright, transparency on white.

    near: (height, width) that will do, so that a large JPEG need not be decoded in full.
    Raises BadEntry for what is empty, damaged, too large or no picture.
    """
    if isinstance(file, bytes):
        if not file:
            raise BadEntry("empty file")
        file = io.BytesIO(file)
    try:
        with Image.open(file) as im:
            if im.width * im.height > MAX_PIXELS:
                raise BadEntry("more than 100 megapixels")
            if near:
                im.draft("RGB", (near[1], near[0]))
            im.load()
            im = ImageOps.exif_transpose(im)
            if im.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # 16-bit gray: Pillow would clip at 255
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            if im.mode == "F":
                im = Image.fromarray((np.nan_to_num(np.asarray(im)).clip(0, 1) * 255).round().astype(np.uint8))
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except BadEntry:
        raise
    except Image.DecompressionBombError:
        raise BadEntry("more than 100 megapixels") from None
    except Image.UnidentifiedImageError:
        raise BadEntry("not a picture") from None
    except FileNotFoundError:
        raise BadEntry("missing file") from None
    except PermissionError:
        raise BadEntry("no permission") from None
    except Exception:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ... for damage
        raise BadEntry("damaged picture") from None


def crop(im, size, resize=0, flip=False, rng=None):
    """PIL image -> (3, H, W) tensor in [-1, 1]: short side resized, then cropped to size = (H, W).

    With rng the crop is random (and mirrored half of the time if flip), without it central.
    """
    h, w = size
    scale = max(h / im.height, w / im.width)
    if resize:
        scale = max(scale, resize / min(im.height, im.width))
    full_w, full_h = max(w, round(im.width * scale)), max(h, round(im.height * scale))
    if rng is None:
        x, y, mirror = (full_w - w) // 2, (full_h - h) // 2, False
    else:
        x, y = rng.integers(full_w - w + 1), rng.integers(full_h - h + 1)
        mirror = flip and rng.random() < 0.5
    if (full_w, full_h) != im.size:
        sx, sy = im.width / full_w, im.height / full_h  # resize the crop's part only: a 1x10000 picture is cheap
        im = im.resize((w, h), Image.BICUBIC, box=(x * sx, y * sy, (x + w) * sx, (y + h) * sy))
    else:
        im = im.crop((x, y, x + w, y + h))
    array = np.array(im)  # (H, W, 3)
    if mirror:
        array = array[:, ::-1].copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = image.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def grid_image(images, columns, gap=2):
    """images (B, 3, H, W) in [-1, 1] -> one PIL image, row by row, on white."""
    b, _, h, w = images.shape
    rows = -(-b // columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet


def caption_lines(raw):
    """bytes of a .txt -> its captions, one a line, without empty ones."""
    return [line.strip() for line in raw.decode("utf-8-sig", "replace").splitlines() if line.strip()]


# --- sources -----------------------------------------------------------------------------------------


class Folder:
    """Pictures below a folder, each with a same-stem .txt beside it."""

    damaged = ()

    def __init__(self, root):
        self.root, self.paths, seen = Path(root), [], set()
        for here, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:  # a symbolic link back up
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            self.paths += [os.path.join(here, f) for f in sorted(files) if f.lower().endswith(EXTENSIONS)]
        self.paths.sort()

    def __len__(self):
        return len(self.paths)

    def key(self, i):
        return os.path.relpath(self.paths[i], self.root)

    def stamp(self, i):
        """What changes when the entry does."""
        try:
            s = os.stat(self.paths[i])
        except OSError:
            return "missing"
        return f"{s.st_size} {s.st_mtime_ns}"

    def picture(self, i, near=None):
        try:
            if os.path.getsize(self.paths[i]) == 0:
                raise BadEntry("empty file")
        except OSError:
            raise BadEntry("missing file") from None
        return open_rgb(self.paths[i], near)

    def captions(self, i, rng=None):
        path = os.path.splitext(self.paths[i])[0] + ".txt"
        try:
            with open(path, "rb") as f:
                lines = caption_lines(f.read())
        except OSError:
            raise BadEntry("no caption file") from None
        if not lines:
            raise BadEntry("empty caption")
        return lines


class Shards:
    """WebDataset tar shards as img2dataset writes them: key.jpg, key.txt, key.json side by side.

    Only the tar headers are read at the start; a member is then read where it lies in its shard.
    Nothing is unpacked, and any process or worker can read any entry at any time.
    """

    def __init__(self, paths):
        self.shards, self.entries, self.damaged, self.fds = paths, [], [], {}
        for shard, path in enumerate(paths):
            found = {}  # key -> {"picture": (offset, size), "txt": (offset, size)}
            try:
                with tarfile.open(path, "r:") as tar:
                    for m in tar:
                        folder, _, name = m.name.rpartition("/")
                        stem, _, extension = name.partition(".")  # WebDataset: the key ends at the first dot
                        kind = "picture" if f".{extension.lower()}" in EXTENSIONS else extension.lower()
                        if m.isfile() and kind in ("picture", "txt"):
                            key = f"{folder}/{stem}" if folder else stem
                            found.setdefault(key, {})[kind] = (m.offset_data, m.size)
                with open(path, "rb") as f:
                    f.seek(-512, os.SEEK_END)
                    whole = not any(f.read())  # a tar ends with empty blocks
                if not whole:
                    self.damaged.append((path, "shard cut short; what is there is used"))
            except (tarfile.TarError, OSError, EOFError) as e:
                self.damaged.append((path, f"damaged shard ({e}); what is before is used"))
            self.entries += [(shard, k, v["picture"], v.get("txt")) for k, v in found.items() if "picture" in v]

    def __len__(self):
        return len(self.entries)

    def key(self, i):
        return self.entries[i][1]

    def stamp(self, i):
        shard, _, picture, _ = self.entries[i]
        s = os.stat(self.shards[shard])
        return f"{shard} {picture} {s.st_size} {s.st_mtime_ns}"

    def read(self, shard, part):
        who = (os.getpid(), shard)  # a file descriptor is not shared with a forked worker
        if who not in self.fds:
            self.fds[who] = os.open(self.shards[shard], os.O_RDONLY)
        offset, size = part
        return os.pread(self.fds[who], size, offset)

    def picture(self, i, near=None):
        shard, _, part, _ = self.entries[i]
        return open_rgb(self.read(shard, part), near)

    def captions(self, i, rng=None):
        shard, _, _, part = self.entries[i]
        if part is None:
            raise BadEntry("no caption file")
        lines = caption_lines(self.read(shard, part))
        if not lines:
            raise BadEntry("empty caption")
        return lines


class Scenes:
    """Generated pictures (scenes.py): entry i is a pure function of (seed, i)."""

    damaged = ()

    def __init__(self, n, size, seed=0):
        self.n, self.size, self.seed = n, size, seed

    def __len__(self):
        return self.n

    def key(self, i):
        return f"scene-{self.seed}-{i}"

    def stamp(self, i):
        return ""

    def picture(self, i, near=None):
        return render(scene_at(self.seed, i), *self.size)

    def captions(self, i, rng=None):
        rng = np.random.default_rng((self.seed, i, 1)) if rng is None else rng
        return [caption(scene_at(self.seed, i), rng)[0]]


def open_source(spec, cfg):
    """--data or --val_data -> source.  Raises ValueError when there is nothing there."""
    if spec == "scenes":
        return Scenes(cfg.n_scenes, parse_size(cfg.size))
    if os.path.isdir(spec):
        source = Folder(spec)
    else:
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
        if braces:
            lo, hi = braces.groups()
            names = [spec.replace(braces[0], str(k).zfill(len(lo))) for k in range(int(lo), int(hi) + 1)]
        else:
            names = sorted(glob.glob(spec)) or [spec]
        missing = [n for n in names if not os.path.isfile(n)]
        if missing:
            raise ValueError(f"{missing[0]} is neither a folder nor a tar shard; --data takes 'scenes', a folder, "
                             "or shards as path, glob or {00000..00041}")
        source = Shards(names)
    if not len(source):
        raise ValueError(f"no pictures in {spec}; looked for {' '.join(EXTENSIONS)}")
    return source


def split(cfg):
    """-> (source, indices of training entries), (source, indices of validation entries)."""
    source = open_source(cfg.data, cfg)
    everything = np.arange(len(source))
    if cfg.val_data:
        val = open_source(cfg.val_data, cfg)
        return (source, everything), (val, np.arange(len(val)))
    share = np.array([zlib.crc32(source.key(i).encode("utf-8", "replace")) for i in everything]) / 2**32
    train, val = everything[share >= cfg.val_fraction], everything[share < cfg.val_fraction]
    if not len(val):  # a handful of pictures: validate on what is there rather than not at all
        val = everything[np.argsort(share)[:1]]
        train = everything if len(everything) == 1 else everything[np.argsort(share)[1:]]
    return (source, train), (source, val)


# --- samples of stage 1 ------------------------------------------------------------------------------


class Order:
    """Position p = 0, 1, 2, ... -> entry: every epoch a new permutation, a pure function of (seed, epoch)."""

    def __init__(self, indices, seed):
        self.indices, self.seed, self.epoch, self.perm = indices, seed, None, None

    def __getitem__(self, p):
        epoch, i = divmod(p, len(self.indices))
        if epoch != self.epoch:
            self.epoch = epoch
            self.perm = np.random.default_rng((self.seed, epoch)).permutation(self.indices)
        return int(self.perm[i])


class Pictures(torch.utils.data.Dataset):
    """Position p -> (image (3, H, W) in [-1, 1], caption, skipped).

    An entry that cannot be used gives way to the next in order; skipped lists its (key, why).
    seed None: entries in order, central crop, first caption (validation).
    Raises ValueError when no entry can be used.
    """

    def __init__(self, source, indices, cfg, seed=None):
        self.source, self.indices, self.cfg, self.seed = source, indices, cfg, seed
        self.size = parse_size(cfg.size)
        self.order = None if seed is None else Order(indices, seed)

    def __len__(self):
        return len(self.indices)

    def load(self, i, rng):
        """Entry i -> image, caption; BadEntry if either is missing."""
        lines = self.source.captions(i, rng) if self.cfg.captions else [""]
        near = [2 * max(s, self.cfg.resize) for s in self.size]
        im = self.source.picture(i, near)
        image = crop(im, self.size, self.cfg.resize, self.cfg.flip, rng)
        return image, lines[0 if rng is None else rng.integers(len(lines))]

    def __getitem__(self, p):
        skipped = []
        for q in range(p, p + 2 * len(self.indices)):  # two epochs from anywhere see every entry
            rng = None if self.seed is None else np.random.default_rng((self.seed, p))
            i = int(self.indices[q % len(self.indices)]) if self.order is None else self.order[q]
            try:
                return *self.load(i, rng), skipped
            except BadEntry as e:
                skipped.append((self.source.key(i), str(e)))
        why = "; ".join(f"{k}: {r}" for k, r in skipped[:3])
        raise ValueError(f"none of the {len(self.indices)} entries can be used ({why})")


def collate(samples):
    """[(image, caption, skipped)] -> images (B, 3, H, W), captions, skipped."""
    images, captions, skipped = zip(*samples)
    return torch.stack(images), list(captions), [s for part in skipped for s in part]


class Skipped:
    """What was passed over: each key once, counted by reason, the first ones named."""

    def __init__(self, say=print):
        self.why, self.say = {}, say

    def add(self, skipped):
        for key, reason in skipped:
            if key not in self.why:
                self.why[key] = reason
                if len(self.why) <= 100:
                    self.say(f"skipped {key}: {reason}")

    def counts(self):
        reasons = sorted(set(self.why.values()))
        return {r: sum(v == r for v in self.why.values()) for r in reasons}

    def __str__(self):
        parts = ", ".join(f"{n} {r}" for r, n in self.counts().items())
        return f"skipped {len(self.why)} entries" + (f" ({parts})" if parts else "")


class StepSampler:
    """The positions that one process reads at steps start ... stop - 1, micro-batch by micro-batch.

    The global batch of step s is positions s*batch ... (s+1)*batch - 1; process `rank` of `world` takes
    its contiguous share of each, in `accum` parts.
    """

    def __init__(self, start, stop, batch, accum=1, rank=0, world=1):
        self.steps, self.batch, self.accum, self.rank, self.world = range(start, stop), batch, accum, rank, world

    def __len__(self):
        return len(self.steps) * self.accum

    def __iter__(self):
        n = self.batch // (self.accum * self.world)
        for step in self.steps:
            first = step * self.batch + self.rank * n * self.accum
            for k in range(self.accum):
                yield list(range(first + k * n, first + (k + 1) * n))


def make_loader(dataset, sampler, workers, collate_fn):
    """A DataLoader over the sampler's positions, in their order whatever the number of workers."""
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_fn,
                                       pin_memory=torch.cuda.is_available())


# --- text --------------------------------------------------------------------------------------------


class Text:
    """SentencePiece BPE: lowercased, NFKC, with byte fallback, so that any Unicode prompt has ids.

    A caption becomes [BOS] ids [EOS] and pads, an empty one [BOS] and pads; pad t is a token of its own
    for each text position (DALL-E, arXiv:2102.12092 sec. 2.2): id n_vocab + t.
    """

    def __init__(self, proto, length):
        self.proto, self.length = proto, length  # proto: bytes of the SentencePiece model
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.n_vocab = len(self.sp)
        self.rank = {self.sp.id_to_piece(i): self.sp.get_score(i) for i in range(self.n_vocab)
                     if not (self.sp.is_byte(i) or self.sp.is_control(i) or self.sp.is_unknown(i))}
        self.n_cut = 0

    @staticmethod
    def train(captions, vocab_size):
        """captions: iterable of str -> bytes of a SentencePiece model of at most vocab_size tokens."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions), model_writer=model, vocab_size=vocab_size, model_type="bpe",
                normalization_rule_name="nfkc_cf", byte_fallback=True, character_coverage=1.0,
                hard_vocab_limit=False, num_threads=1, minloglevel=2)
        except RuntimeError as e:
            raise ValueError(f"no text model of {vocab_size} tokens can be trained on these captions ({e}); "
                             "use a larger --vocab_size") from None
        return model.getvalue()

    def pieces(self, caption, dropout=0.0, rng=None):
        """caption -> ids, without BOS and EOS.

        With dropout each possible merge of a word is left out with that probability, anew before every
        merge (BPE-dropout, arXiv:1910.13267 algorithm 1).  SentencePiece has something like it, but
        cannot be re-seeded, and resuming needs that.
        """
        caption = " ".join(caption.split())
        if not dropout:
            return self.sp.encode(caption)
        symbols = [s for word in re.findall("\u2581?[^\u2581]+", self.sp.normalize(caption))
                   for s in self.merge(list(word), dropout, rng)]
        ids = []
        for s in symbols:
            ids += [self.sp.piece_to_id(s)] if s in self.rank else [self.sp.piece_to_id(f"<0x{b:02X}>") for b in s.encode()]
        return ids

    def merge(self, symbols, dropout, rng):
        """The characters of a word -> its pieces."""
        while True:
            merges = [(-self.rank[a + b], k) for k, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in self.rank]
            merges = [m for m in merges if rng.random() >= dropout]
            if not merges:
                return symbols
            k = min(merges)[1]
            symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]

    def encode(self, caption, dropout=0.0, rng=None):
        """caption -> ids (T,).  One too long is cut, and counted in n_cut.  Empty: the unconditional text."""
        ids = self.pieces(caption, dropout, rng)
        if len(ids) > self.length - 2:
            ids = ids[: self.length - 2]
            self.n_cut += 1
        ids = [self.sp.bos_id(), *ids, self.sp.eos_id()] if ids else [self.sp.bos_id()]
        return torch.tensor(ids + [self.n_vocab + t for t in range(len(ids), self.length)])

    def decode(self, ids):
        """ids (T,) -> the caption."""
        return self.sp.decode([int(i) for i in ids if int(i) < self.n_vocab])


# --- samples of stage 2 ------------------------------------------------------------------------------


class CodeCache:
    """The codes of a whole set in a memory-mapped file, made once by the frozen tokenizer.

    codes: memmap (n, crops, h, w); ok: (n,) False where the entry could not be used.
    The folder's name is a hash of all it depends on: tokenizer, listing, size, crops, seed.
    """

    def __init__(self, folder):
        self.codes = np.load(folder / "codes.npy", mmap_mode="r")
        self.ok = np.load(folder / "ok.npy")
        self.skipped = json.loads((folder / "skipped.json").read_text())

    @staticmethod
    def folder(root, source, indices, cfg, crops, seed, vq_hash):
        digest = hashlib.sha256(json.dumps([vq_hash, type(source).__name__, cfg.size, cfg.resize, cfg.flip,
                                            cfg.captions, crops, seed]).encode())
        for i in indices:
            digest.update(f"{source.key(i)}\0{source.stamp(i)}\n".encode("utf-8", "replace"))
        return Path(root) / f"codes-{digest.hexdigest()[:16]}"

    @staticmethod
    def build(folder, source, indices, cfg, crops, seed, encode, grid, n_codes, rank=0, world=1, barrier=lambda: None,
              batch=64):
        """Encode every entry, each process a share; encode: images (B, 3, H, W) -> codes (B, h, w).

        Central crop if crops is 1, else crops random ones.  Appears under its name when complete.
        """
        part = folder.with_name(folder.name + ".part")
        dtype = np.uint16 if n_codes <= 2**16 else np.int32
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            np.lib.format.open_memmap(part / "codes.npy", "w+", dtype, (len(indices), crops, *grid))
        barrier()
        codes = np.load(part / "codes.npy", mmap_mode="r+")
        pictures = CropsOf(source, indices, cfg, crops, None if crops == 1 else seed)
        rows = [r for r in range(len(indices) * crops) if r // crops % world == rank]
        loader = torch.utils.data.DataLoader(pictures, batch, sampler=rows, num_workers=cfg.workers, collate_fn=list)
        skipped, bad = [], []
        for chunk in tqdm(loader, desc="encoding the pictures once", unit="batch", disable=rank > 0, leave=False):
            good = [s for s in chunk if torch.is_tensor(s[1])]
            for row, why in (s for s in chunk if not torch.is_tensor(s[1])):
                bad.append(row // crops)
                skipped.append((source.key(int(indices[row // crops])), why))
            if good:
                for (row, _), c in zip(good, encode(torch.stack([s[1] for s in good])).cpu().numpy()):
                    codes[row // crops, row % crops] = c
        codes.flush()
        (part / f"bad-{rank}.json").write_text(json.dumps([bad, sorted(set(skipped))]))
        barrier()
        if rank == 0:
            ok, every = np.ones(len(indices), bool), []
            for r in range(world):
                bad, skipped = json.loads((part / f"bad-{r}.json").read_text())
                ok[bad] = False
                every += skipped
            np.save(part / "ok.npy", ok)
            (part / "skipped.json").write_text(json.dumps(every))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        barrier()


class CropsOf(torch.utils.data.Dataset):
    """Row r -> (r, image of crop r % crops of entry r // crops), or (r, why not)."""

    def __init__(self, source, indices, cfg, crops, seed):
        self.pictures, self.crops, self.seed = Pictures(source, indices, cfg), crops, seed

    def __len__(self):
        return len(self.pictures) * self.crops

    def __getitem__(self, r):
        rng = None if self.seed is None else np.random.default_rng((self.seed, r))
        try:
            return r, self.pictures.load(int(self.pictures.indices[r // self.crops]), rng)[0]
        except BadEntry as e:
            return r, str(e)


class Coded(torch.utils.data.Dataset):
    """Position p -> (text ids (T,), codes (N,), 1 if the caption was cut).

    seed None: entries in order, first crop and caption, nothing dropped (validation).
    bpe_dropout: DALL-E, arXiv:2102.12092 sec. 2.2.  cond_drop: the caption is replaced by the empty
    one with that probability, for classifier-free guidance (arXiv:2207.12598).
    """

    def __init__(self, source, indices, cache, text, seed=None, bpe_dropout=0.0, cond_drop=0.0):
        self.source, self.cache, self.text, self.seed = source, cache, text, seed
        self.bpe_dropout, self.cond_drop = bpe_dropout, cond_drop
        self.indices, self.rows = indices, np.flatnonzero(cache.ok)
        if not len(self.rows):
            why = "; ".join(f"{k}: {r}" for k, r in cache.skipped[:3])
            raise ValueError(f"none of the {len(indices)} entries can be used ({why})")
        self.order = None if seed is None else Order(self.rows, seed)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, p):
        row = int(self.rows[p % len(self.rows)]) if self.order is None else self.order[p]
        rng = None if self.seed is None else np.random.default_rng((self.seed, p))
        lines = self.source.captions(int(self.indices[row]), rng)
        crops, before = self.cache.codes[row], self.text.n_cut
        if rng is None:
            ids, codes = self.text.encode(lines[0]), crops[0]
        else:
            line = "" if rng.random() < self.cond_drop else lines[rng.integers(len(lines))]
            ids, codes = self.text.encode(line, self.bpe_dropout, rng), crops[rng.integers(len(crops))]
        return ids, torch.from_numpy(codes.astype(np.int64)).flatten(), self.text.n_cut - before
