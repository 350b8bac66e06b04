"""Captions and pictures as tokens: the text model, the cache of codes, the samples of stage 2.

Shapes: B batch, T text length, h w code grid, N = h*w.
"""

import hashlib
import io
import json
import os
import re
import shutil

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from minit2i.data import BadEntry, Order, Pictures

# --- text --------------------------------------------------------------------------------------------


def read_pieces(proto):
    """bytes of a SentencePiece model -> its processor; ValueError if they are none."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(proto)
    except RuntimeError:
        raise ValueError("the folder's text.model, tokenizer.model or spiece.model is no SentencePiece model") from None
    return pieces


class Text:
    """SentencePiece BPE: lowercased, NFKC, with byte fallback, so that any Unicode prompt has ids.

    A caption becomes [BOS] ids [EOS] and pads, an empty one [BOS] and pads; pad t is a token of its own
    for each text position (DALL-E, arXiv:2102.12092 sec. 2.2): id n_vocab + t.
    """

    fixed = False  # whether an entry's captions must be the same at every look

    def __init__(self, proto, length):
        self.proto, self.length = proto, length  # proto: bytes of the SentencePiece model
        self.sp = read_pieces(proto)
        self.n_vocab = len(self.sp)
        self.rank = {
            self.sp.id_to_piece(i): self.sp.get_score(i)
            for i in range(self.n_vocab)
            if not (self.sp.is_byte(i) or self.sp.is_control(i) or self.sp.is_unknown(i))
        }
        self.n_cut = 0

    @staticmethod
    def train(captions, vocab_size):
        """captions: iterable of str -> bytes of a SentencePiece model of at most vocab_size tokens."""
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                normalization_rule_name="nfkc_cf",
                byte_fallback=True,
                character_coverage=1.0,
                hard_vocab_limit=False,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as e:
            raise ValueError(
                f"no text model of {vocab_size} tokens can be trained on these captions ({e}); "
                "use a larger --vocab_size"
            ) from None
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
        symbols = [
            s
            for word in re.findall("\u2581?[^\u2581]+", self.sp.normalize(caption))
            for s in self.merge(list(word[: 16 * self.length]), dropout, rng)
        ]
        ids = []
        for s in symbols:
            names = [s] if s in self.rank else [f"<0x{b:02X}>" for b in s.encode()]
            ids += [self.sp.piece_to_id(name) for name in names]
        return ids

    def merge(self, symbols, dropout, rng):
        """The characters of a word -> its pieces."""
        while True:
            merges = [
                (-self.rank[a + b], k) for k, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in self.rank
            ]
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


class Crops(torch.utils.data.Dataset):
    """Row r -> (r, image of crop r % crops of entry r // crops), or (r, why there is none).

    One crop is the central one; several are random, a pure function of (seed, r).
    """

    def __init__(self, source, indices, cfg, crops=1, seed=0):
        self.pictures, self.crops, self.seed = Pictures(source, indices, cfg), crops, seed

    def __len__(self):
        return len(self.pictures) * self.crops

    def entry(self, r):
        return int(self.pictures.indices[r // self.crops])

    def __getitem__(self, r):
        rng = None if self.crops == 1 else np.random.default_rng((self.seed, r))
        try:
            return r, self.pictures.load(self.entry(r), rng)[0]
        except BadEntry as e:
            return r, str(e)

    def digest(self):
        """A hash of all that the crops depend on: the listing, sizes and times of the files, size, crops, seed."""
        source, cfg = self.pictures.source, self.pictures.cfg
        settings = [type(source).__name__, cfg.size, cfg.resize, cfg.flip, cfg.captions, self.crops, self.seed]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for i in self.pictures.indices:
            digest.update(f"{source.key(i)}\0{source.stamp(i)}\n".encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


class CodeCache:
    """The codes of a whole set in a memory-mapped file, made once by the frozen tokenizer.

    codes: memmap (n, crops, h, w); ok: (n,) False where the entry could not be used; skipped: [(key, why)].
    """

    def __init__(self, folder):
        self.codes = np.load(folder / "codes.npy", mmap_mode="r")
        self.ok = np.load(folder / "ok.npy")
        self.skipped = json.loads((folder / "skipped.json").read_text())

    @staticmethod
    def build(folder, crops, encode, shape, n_codes, p, batch=64):
        """Encode every crop, each process a share of the entries; the folder appears when it is complete.

        encode: images (B, 3, H, W) -> codes (B, h, w); shape: (h, w); p: train.Processes.
        """
        part = folder.with_name(f"{folder.name}.{p.gather(os.getpid())[0]}.part")  # two runs may share the cache
        n = len(crops.pictures)
        if p.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            dtype = np.uint16 if n_codes <= 2**16 else np.int32
            np.lib.format.open_memmap(part / "codes.npy", "w+", dtype, (n, crops.crops, *shape))
            with open(part / "codes.npy", "rb+") as f:  # a full disk is an error now, not a crash later
                f.seek(0, os.SEEK_END)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, f.tell())
        p.barrier()
        codes = np.load(part / "codes.npy", mmap_mode="r+")
        first, last = n * p.rank // p.world * crops.crops, n * (p.rank + 1) // p.world * crops.crops
        share, workers = range(first, last), crops.pictures.cfg.workers
        loader = torch.utils.data.DataLoader(crops, batch, sampler=share, num_workers=workers, collate_fn=list)
        bad = {}  # entry's row -> why
        for chunk in tqdm(loader, desc="encoding the pictures once", unit="batch", disable=not p.main, leave=False):
            bad |= {r // crops.crops: image for r, image in chunk if isinstance(image, str)}
            good = [(r, image) for r, image in chunk if not isinstance(image, str)]
            if good:
                for (r, _), c in zip(good, encode(torch.stack([image for _, image in good])).cpu().numpy()):
                    codes[r // crops.crops, r % crops.crops] = c
        codes.flush()
        bad = {k: why for share in p.gather(bad) for k, why in share.items()}
        if p.main:
            ok = np.ones(n, bool)
            ok[list(bad)] = False
            np.save(part / "ok.npy", ok)
            keys = [(crops.pictures.source.key(crops.entry(k * crops.crops)), why) for k, why in sorted(bad.items())]
            (part / "skipped.json").write_text(json.dumps(keys))
            if folder.exists():
                shutil.rmtree(part)
            else:
                for path in part.iterdir():
                    with open(path, "rb") as f:
                        os.fsync(f.fileno())
                os.replace(part, folder)
        p.barrier()


class Coded(torch.utils.data.Dataset):
    """Position p -> (text ids (T,), or a frozen encoder's states (T, W); codes (N,); codes (M,) of the shrunk picture; 1 if
    the caption was cut).

    low: cache of the same crops shrunk, for super-resolution; without it M is 0.  seed None: entries in order, first
    crop and caption, nothing dropped (validation).  bpe_dropout: DALL-E, arXiv:2102.12092 sec. 2.2.  cond_drop: the
    caption is replaced by the empty one with that probability, for classifier-free guidance (arXiv:2207.12598).
    """

    def __init__(self, source, indices, cache, text, seed=None, bpe_dropout=0.0, cond_drop=0.0, low=None):
        self.source, self.cache, self.text, self.seed = source, cache, text, seed
        self.bpe_dropout, self.cond_drop, self.low = bpe_dropout, cond_drop, low
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
        try:
            lines = self.source.captions(int(self.indices[row]), None if self.text.fixed else rng)
        except BadEntry:  # gone since the cache was made: as if dropped
            lines = [""]
        crop, before = 0, self.text.n_cut
        if rng is None:
            ids = self.text.encode(lines[0])
        else:
            line = "" if rng.random() < self.cond_drop else lines[rng.integers(len(lines))]
            ids, crop = self.text.encode(line, self.bpe_dropout, rng), rng.integers(len(self.cache.codes[row]))
        codes = flat(self.cache.codes[row][crop])
        low = codes[:0] if self.low is None else flat(self.low.codes[row][crop])
        return ids, codes, low, self.text.n_cut - before


def flat(codes):
    """Codes (h, w) of a cache -> (h*w,) long."""
    return torch.from_numpy(codes.astype(np.int64)).flatten()
