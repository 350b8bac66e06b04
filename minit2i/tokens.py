"""Captions and images as tokens: the text model, the cache of image codes, the samples of stage 2.

Shapes: B batch, T text length, h w code grid, N = h*w.
"""

import hashlib
import io
import json
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from minit2i.checkpoint import write_file
from minit2i.collectives import gather_objects
from minit2i.data import Images, Order, cached_array, none_usable
from minit2i.sources import BadEntry

# --- text ----------------------------------------------------------------------------------------------


def read_pieces(proto):
    """bytes of a SentencePiece model -> its processor; ValueError if they are not one."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(proto)
    except RuntimeError:
        raise ValueError("the folder's text.model, tokenizer.model or spiece.model is no SentencePiece model") from None
    return pieces


NORMAL, UNUSED = 1, 5  # types of a piece; SentencePiece itself makes no UNUSED one
WORD = re.compile("\u2581?\\w+")


def piece_field(piece, score, kind):
    """A piece as bytes to append to a SentencePiece model (protobuf: field 1 of ModelProto is repeated)."""

    def field(data):  # number 1, a length, that many bytes
        n = len(data)
        return b"\n" + (bytes([n]) if n < 128 else bytes([n % 128 + 128, n // 128])) + data

    return field(field(piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))


def as_bytes(text):
    """The names of the pieces that spell a text byte by byte."""
    return [f"<0x{b:02X}>" for b in text.encode()]


class Text:
    """SentencePiece BPE: lowercased, NFKC, with byte fallback: any Unicode prompt has ids.

    A caption becomes [BOS] ids [EOS] and pads, an empty one [BOS] and pads; each text position t has a pad token of its
    own (DALL-E, arXiv:2102.12092 sec. 2.2): id n_vocab + t.
    """

    fixed = False  # whether an entry must have the same captions every time it is read

    def __init__(self, proto, length):
        self.proto, self.length = proto, length  # proto: bytes of the SentencePiece model
        self.sp = read_pieces(proto)
        self.n_vocab = len(self.sp)
        self.rank = {
            self.sp.id_to_piece(i): self.sp.get_score(i)
            for i in range(self.n_vocab)
            if not (self.sp.is_byte(i) or self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i))
        }
        self.added = {self.sp.id_to_piece(i): i for i in range(self.n_vocab) if self.sp.is_unused(i)}  # by `grow`
        self.n_cut = 0

    @staticmethod
    def train(captions, vocab_size):
        """Iterable of captions -> bytes of a SentencePiece model of at most vocab_size tokens."""
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
                max_sentence_length=2**20,  # bytes; longer lines would be left out without a word
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as e:
            raise ValueError(
                f"no text model of {vocab_size} tokens can be trained on these captions ({e}); "
                "use a larger --vocab_size"
            ) from None
        return model.getvalue()

    @staticmethod
    def grow(proto, captions, vocab_size):
        """A SentencePiece model (bytes) with up to vocab_size tokens: what new captions need most, with ids of its own.

        That is characters without a piece, and whole words of several pieces, which occur at least twice.  All other
        words keep their ids, which further merges of BPE would change (a new "the" that of "three", by "th").
        """
        text, letters, words = Text(proto, 3), Counter(), Counter()
        if vocab_size <= text.n_vocab:
            raise ValueError(
                f"--grow_vocab: the text model has {text.n_vocab} tokens already; use a larger --vocab_size"
            )
        for word in (word for caption in captions for word in text.words(caption)):
            letters.update(c for c in word if c not in text.rank)
            words.update(WORD.findall(word)[:1])
        several = {w: n for w, n in words.items() if w not in text.added and len(text.merge([*w[:200]])) > 1}
        found = [
            (-n, piece, kind) for some, kind in ((letters, NORMAL), (several, UNUSED)) for piece, n in some.items()
        ]
        found = sorted(x for x in found if x[0] < -1 and len(x[1]) <= 200)[: vocab_size - text.n_vocab]
        lowest = min(text.sp.get_score(i) for i in range(text.n_vocab))
        return proto + b"".join(piece_field(piece, lowest - 1 - i, kind) for i, (_, piece, kind) in enumerate(found))

    def spelling(self, n_vocab):
        """For each token from n_vocab on the ids that spelled it before `grow`: pieces, and bytes of characters."""

        def ids(s):
            known = s in self.rank and self.sp.piece_to_id(s) < n_vocab
            return [self.sp.piece_to_id(name) for name in ([s] if known else as_bytes(s))]

        pieces = (self.sp.id_to_piece(i) for i in range(n_vocab, self.n_vocab))
        return [[i for s in self.merge([*piece]) for i in ids(s)] for piece in pieces]

    def words(self, caption):
        """caption -> its normalised words, with a leading \u2581 each."""
        return re.findall("\u2581?[^\u2581]+", self.sp.normalize(" ".join(caption.split())))

    def pieces(self, caption, dropout=0.0, rng=None):
        """caption -> ids, without BOS and EOS.

        dropout: the probability with which each possible merge of a word is skipped, sampled anew before every merge
        (BPE-dropout, arXiv:1910.13267 algorithm 1).  SentencePiece's own sampling cannot be re-seeded, which resuming
        needs.
        """
        words = self.words(caption) if dropout or self.added else []
        added = {word: w[0] for word in words if (w := WORD.match(word)) and w[0] in self.added}
        if not dropout and not added:
            return self.sp.encode(" ".join(caption.split()))
        ids = []
        for word in words:
            if word in added and (not dropout or rng.random() >= dropout):
                ids.append(self.added[added[word]])
                word = word.removeprefix(added[word])
            for s in self.merge(list(word[: 16 * self.length]), dropout, rng):
                names = [s] if s in self.rank else as_bytes(s)
                ids += [self.sp.piece_to_id(name) for name in names]
        return ids

    def merge(self, symbols, dropout=0.0, rng=None):
        """The characters of a word -> its pieces."""
        while True:
            merges = [
                (-self.rank[a + b], k) for k, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in self.rank
            ]
            merges = [m for m in merges if rng.random() >= dropout] if dropout else merges
            if not merges:
                return symbols
            k = min(merges)[1]
            symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]

    def encode(self, caption, dropout=0.0, rng=None):
        """caption -> ids (T,).  A caption that is too long is cut and counted in n_cut.  "": the unconditional text."""
        ids = self.pieces(caption, dropout, rng)
        if len(ids) > self.length - 2:
            ids = ids[: self.length - 2]
            self.n_cut += 1
        ids = [self.sp.bos_id(), *ids, self.sp.eos_id()] if ids else [self.sp.bos_id()]
        return torch.tensor(ids + [self.n_vocab + t for t in range(len(ids), self.length)])

    def decode(self, ids):
        """ids (T,) -> caption."""
        return self.sp.decode([int(i) for i in ids if int(i) < self.n_vocab])


def new_vocabulary(cfg, own, captions):
    """The SentencePiece model (bytes) of a new run: that of --init, with --grow_vocab extended by the captions' words;
    the prior's own, if it has one; else trained on the captions."""
    if not cfg.init:
        return own or Text.train(captions, cfg.vocab_size)
    proto = Path(cfg.init, "text.model").read_bytes()
    return Text.grow(proto, captions, cfg.vocab_size) if cfg.grow_vocab else proto


# --- codes ---------------------------------------------------------------------------------------------


class Crops(torch.utils.data.Dataset):
    """Row r -> (r, image of crop r % crops of entry r // crops), or (r, the reason why there is none).

    A single crop is the central one; several are random, a pure function of (seed, r).  samples: how many random codes
    the cache has of each crop, at `temperature` (VQ.sample_codes); 0: its most likely ones.
    """

    def __init__(self, source, indices, cfg, crops=1, seed=0, captions=True, samples=0, temperature=1.0):
        self.images, self.crops, self.seed = Images(source, indices, cfg, captions=captions), crops, seed
        self.samples, self.temperature = samples, temperature

    def __len__(self):
        return len(self.images) * self.crops

    def entry(self, r):
        return int(self.images.indices[r // self.crops])

    def __getitem__(self, r):
        rng = None if self.crops == 1 else np.random.default_rng((self.seed, r))
        try:
            return r, self.images.load(self.entry(r), rng)[0]
        except BadEntry as e:
            return r, str(e)

    def digest(self):
        """A hash of all that the crops depend on: the listing, sizes and times of the files, and the settings."""
        images, source = self.images, self.images.source
        seed = self.seed if self.crops > 1 or self.samples else 0  # nothing is random in one central crop
        settings = [type(source).__name__, images.size, images.cfg.resize, images.captions, self.crops, seed]
        settings += [images.cfg.crop] if images.cfg.crop != "any" else []
        settings += [self.samples, self.temperature] if self.samples else []
        digest = hashlib.sha256(json.dumps(settings).encode())
        for i in images.indices:
            digest.update(f"{source.key(i)}\0{source.stamp(i)}\n".encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


class CodeCache:
    """The codes of a whole set, in a folder.

    codes: memmap (n, crops x samples, h, w); ok: (n,) False where the entry could not be used; skipped: [(key, why)].
    """

    def __init__(self, folder):
        self.folder, self.codes = folder, np.load(folder / "codes.npy", mmap_mode="r")
        skipped = json.loads((folder / "skipped.json").read_text())
        self.ok = np.ones(len(self.codes), bool)
        self.ok[[row for row, _, _ in skipped]] = False
        self.skipped = [(key, why) for _, key, why in skipped]

    def __reduce__(self):  # a spawned worker maps the file again instead of receiving a copy
        return CodeCache, (self.folder,)

    def differing(self, n=256):
        """Share of the codes in which the first two grids of an entry differ, over about n entries."""
        rows = np.flatnonzero(self.ok)
        first, second = self.codes[rows[:: -(-len(rows) // n)], :2].swapaxes(0, 1)
        return float((first != second).mean())

    def __getitem__(self, place):
        """(row, crop) -> codes (N,) long."""
        return torch.from_numpy(self.codes[place].astype(np.int64)).flatten()


def code_cache(folder, crops, vq, procs, view=lambda images: images, name=""):
    """The codes of crops, encoded now unless the cache folder has them -> CodeCache.

    view: applied to the images (B, 3, H, W) before encoding, as shrinking is for coarse codes; name: names it and its
    parameters.
    """
    parts = ["codes", vq.hash, crops.digest(), name, procs.precision]
    folder = Path(folder, "-".join(part for part in parts if part))
    height, width = view(torch.zeros(1, 3, *crops.images.size)).shape[-2:]
    shape = (len(crops.images), crops.crops * max(1, crops.samples), *vq.grid(height, width))
    dtype = np.uint16 if vq.cfg.n_codes <= 2**16 else np.int32
    cached_array(folder / "codes.npy", shape, dtype, lambda codes, rows: encode(codes, rows, crops, vq, procs, view))
    return CodeCache(folder)


@torch.no_grad()
def encode(codes, rows, crops, vq, procs, view, batch=64):
    """Fill this process's rows of codes (n, crops x samples, h, w); write skipped.json with unusable entries."""
    share = range(rows.start * crops.crops, rows.stop * crops.crops)
    loader = torch.utils.data.DataLoader(
        crops, batch, sampler=share, num_workers=crops.images.cfg.workers, collate_fn=list
    )
    bad, each = {}, max(1, crops.samples)  # row -> why
    for chunk in tqdm(loader, desc="encoding the images once", unit="batch", disable=not procs.main, leave=False):
        bad |= {r // crops.crops: image for r, image in chunk if isinstance(image, str)}
        good = [(r, image) for r, image in chunk if not isinstance(image, str)]
        if good:
            images = view(torch.stack([image for _, image in good]).to(procs.device))
            with procs.autocast():
                if crops.samples:
                    seeds = [crops.seed * 1_000_003 + r for r, _ in good]
                    encoded = vq.sample_codes(images, crops.samples, crops.temperature, seeds)  # (b, samples, h, w)
                else:
                    encoded = vq.encode(images)[:, None]
            for (r, _), grids in zip(good, encoded.cpu().numpy()):
                row, crop = divmod(r, crops.crops)
                codes[row, crop * each : (crop + 1) * each] = grids
    bad = {row: why for share in gather_objects(bad) for row, why in share.items()}
    if procs.main:
        keys = [(row, crops.images.source.name(crops.entry(row * crops.crops)), bad[row]) for row in sorted(bad)]
        write_file(Path(codes.filename).with_name("skipped.json"), json.dumps(keys))


# --- samples of stage 2 --------------------------------------------------------------------------------


class Coded(torch.utils.data.Dataset):
    """Position p -> {"text": ids (T,), or a frozen encoder's states (T, W); "codes": (N,); ...; "n_cut": 0 or 1}.

    caches: {"codes": CodeCache} and those of other views of the same crops ("coarse").  n_cut 1: the caption was cut.
    seed None: entries in order, first crop and caption, nothing dropped (validation).
    bpe_dropout: DALL-E, arXiv:2102.12092 sec. 2.2.  cond_drop: the probability that the empty caption replaces the
    caption, for classifier-free guidance (arXiv:2207.12598).
    """

    def __init__(self, source, indices, caches, text, seed=None, bpe_dropout=0.0, cond_drop=0.0):
        self.source, self.indices, self.caches, self.text = source, indices, caches, text
        self.seed, self.bpe_dropout, self.cond_drop = seed, bpe_dropout, cond_drop
        self.rows = np.flatnonzero(caches["codes"].ok)
        if not len(self.rows):
            raise none_usable(indices, caches["codes"].skipped)
        self.order = None if seed is None else Order(self.rows, seed, source.times(np.asarray(indices)[self.rows]))

    def __len__(self):
        return len(self.rows)

    def captions(self, row, rng=None):
        """The captions of a row of the cache."""
        try:
            return self.source.captions(int(self.indices[row]), None if self.text.fixed else rng)
        except BadEntry:  # gone since the cache was made: as if dropped
            return [""]

    def __getitem__(self, p):
        row = int(self.rows[p % len(self.rows)]) if self.order is None else self.order[p]
        rng = None if self.seed is None else np.random.default_rng((self.seed, p))
        lines, crop, before = self.captions(row, rng), 0, self.text.n_cut
        if rng is None:
            text = self.text.encode(lines[0])
        else:
            line = "" if rng.random() < self.cond_drop else lines[rng.integers(len(lines))]
            text = self.text.encode(line, self.bpe_dropout, rng)
            crop = rng.integers(self.caches["codes"].codes.shape[1])
        codes = {name: cache[row, crop] for name, cache in self.caches.items()}
        return {"text": text} | codes | {"n_cut": self.text.n_cut - before}


def collate(samples):
    """[sample] -> batch: tensors are stacked to (B, ...), numbers summed."""
    return {
        name: torch.stack([s[name] for s in samples]) if torch.is_tensor(value) else sum(s[name] for s in samples)
        for name, value in samples[0].items()
    }
