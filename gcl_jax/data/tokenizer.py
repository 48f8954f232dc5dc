"""Tokenizers: CLIP's byte-pair encoding, or any Hugging Face tokenizer, to fixed-length ids.

CLIP's ids equal those of open_clip's `SimpleTokenizer`: same cleaning, same word pattern, same
merges; the splitting and merging run in the Rust `tokenizers` library. (Letters of Unicode 17 and
later may be split otherwise, as they are between versions of open_clip's own `regex`.) Those of
SigLIP, BERT, XLM-R, ... equal open_clip's `HFTokenizer`, or with clean="none" transformers alone.
"""

import gzip
import html
import importlib.util
import os
import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from gcl_jax.errors import ConfigError, first_line, to_install
from gcl_jax.paths import local_path

CLIP_START, CLIP_END = "<start_of_text>", "<end_of_text>"
# CLIP's pattern is case-insensitive. That matters for its few words, where the long s is an s, and
# for U+0345, which is no letter but folds to one, and so matches nothing.
_CLIP_WORDS = (
    r"<[sSſ][tT][aA][rR][tT]_[oO][fF]_[tT][eE][xX][tT]>|<[eE][nN][dD]_[oO][fF]_[tT][eE][xX][tT]>"
    r"|'[sSſtTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL]|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
# Files of which a tokenizer folder has one; without it transformers makes up an empty vocabulary.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.txt", "vocab.json")
_KINDS = ("tokenizer.json", "tokenizer_config.json", "config.json")
_TOKENIZER_FILES = (*_VOCABULARIES, "*token*.json", "config.json", "merges.txt")


class Tokenizer:
    """Callable: n texts -> int32 ids (n, context_length), filled up with `pad_id`.

    Longer texts are cut, keeping the final special tokens. Pickles as its name, so that worker
    processes rebuild it. `load_tokenizer` makes one.

    Attributes:
      name, context_length, clean: as given to `load_tokenizer`.
      vocab_size: ids lie in [0, vocab_size).
      pads_left: padding goes before the text, as some Hugging Face tokenizers want it.
      pad_id: padding; `ids != pad_id` is the attention mask of BERT, XLM-R and their like (so a
        text that spells the padding token out is masked there, as in open_clip). CLIP's is 0, a
        real token too, but its causal tower reads the end token, the highest id (argmax). SigLIP
        pads with its end token; its tower has no mask.
    """

    def __init__(
        self,
        name: str,
        context_length: int,
        clean: str,
        vocab_size: int,
        pad_id: int,
        encode: Callable[[list[str]], list[list[int]]],
        pads_left: bool = False,
    ):
        """`encode` cuts, and leaves the padding to this class."""
        self.name, self.context_length, self.clean = name, context_length, clean
        self.vocab_size, self.pad_id, self.pads_left = vocab_size, pad_id, pads_left
        self._encode = encode

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.context_length), self.pad_id, np.int32)
        for row, own in zip(ids, self._encode(texts) if texts else [], strict=True):
            start = self.context_length - len(own) if self.pads_left else 0
            row[start : start + len(own)] = own
        return ids

    def longest(self, texts: Sequence[str]) -> int:
        """How many columns of the ids of `texts` hold more than padding behind a text."""
        if self.pads_left:
            return self.context_length
        return max(map(len, self._encode(list(texts))), default=0)

    def __reduce__(self):
        return load_tokenizer, (self.name, self.context_length, self.clean)


@lru_cache
def load_tokenizer(name: str, context_length: int, clean: str = "") -> Tokenizer:
    """Returns the tokenizer `name`: "clip", or a folder or hub id that transformers can load.

    Args:
      name: "clip" is the vocabulary of OpenAI's CLIP, bundled. A folder holds tokenizer.json,
        vocab.txt or a SentencePiece model. Code in it is never run, and nothing is downloaded
        unless `name` is no folder.
      context_length: columns of the ids, special tokens included.
      clean: what is done to a text first, named as in open_clip: "canonicalize" (SigLIP), "lower",
        "whitespace", "none", or "", open_clip's default: "lower" for CLIP, else "whitespace".

    Raises:
      ConfigError: context_length < 2, tokenizer not found or one without a padding token, unknown
        `clean`, transformers not installed.
    """
    if context_length < 2:
        raise ConfigError(f"context_length must be at least 2, not {context_length}")
    if clean and clean not in CLEANERS:
        raise ConfigError(
            f"config.model.text.clean={clean!r} must be one of {', '.join(CLEANERS)}, or empty"
        )
    if name == "clip":
        return _clip(name, context_length, clean)
    return _hugging_face(name, context_length, clean)


def _whitespace(text: str) -> str:
    """Mojibake fixed, HTML unescaped, blanks made one space."""
    # In most texts there is nothing to mend, and looking for it costs more than their ids.
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    """Also without ASCII punctuation: big_vision's cleaning, on which SigLIP was trained."""
    text = _whitespace(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANERS: dict[str, Callable[[str], str]] = {
    "canonicalize": _canonicalize,
    "lower": _lower,
    "whitespace": _whitespace,
    "none": str,
}


def _clip(name: str, context_length: int, clean: str) -> Tokenizer:
    bpe, pad_id, cleaner = clip_bpe(), 0, CLEANERS[clean or "lower"]
    bpe.enable_truncation(context_length)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in bpe.encode_batch_fast([cleaner(text) for text in texts])]

    return Tokenizer(name, context_length, clean, 49408, pad_id, encode)


def clip_bpe() -> tokenizers.Tokenizer:
    """The encoder of cleaned text; vocabulary order as in CLIP: bytes, word-final bytes, merges."""
    packed = resources.files("gcl_jax.data") / "clip_bpe/bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    # CLIP uses the first 48894 merges, below a line of version
    merges = [(left, right) for left, right in map(str.split, lines[1:48895])]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    vocab = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    ids = {token: i for i, token in enumerate([*vocab, CLIP_START, CLIP_END])}
    # Special tokens spelled out in a text are words of the pattern. Merges ranked last, which no
    # other word can reach, give them their ids.
    plain = models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
    for special in (CLIP_START, CLIP_END):
        left, *rest = [token.value for token in plain.tokenize(special)]
        for right in rest:
            merges.append((left, right))
            left += right
            ids.setdefault(left, len(ids))
        ids[left] = ids[special]
    bpe = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{CLIP_START} $A {CLIP_END}",
        special_tokens=[(token, ids[token]) for token in (CLIP_START, CLIP_END)],
    )
    return bpe


def _hugging_face(name: str, context_length: int, clean: str) -> Tokenizer:
    hf, cleaner = load_hugging_face(name), CLEANERS[clean or "whitespace"]
    if hf.pad_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no padding token")

    def encode(texts: list[str]) -> list[list[int]]:
        cleaned = [cleaner(text) for text in texts]
        return hf(cleaned, truncation=True, max_length=context_length)["input_ids"]

    # Not the number of tokens: some vocabularies have holes.
    vocab_size = max(hf.get_vocab().values()) + 1
    pads_left = hf.padding_side == "left"
    return Tokenizer(name, context_length, clean, vocab_size, hf.pad_token_id, encode, pads_left)


def load_hugging_face(name: str) -> Any:
    """The transformers tokenizer of a folder, or of a hub id. Raises `ConfigError`."""
    # transformers warns where torch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from transformers import AutoTokenizer  # slow to import, and needed here only
    except ImportError:
        raise ConfigError(f"tokenizer {name!r} needs transformers: {to_install('text')}") from None
    folder = local_path(name)
    if not folder.is_dir():
        folder = _download(name)
    if not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
        raise ConfigError(f"tokenizer folder {name} has none of {', '.join(_VOCABULARIES)}")
    if not any((folder / file).is_file() for file in _KINDS):
        raise ConfigError(
            f"tokenizer folder {name} has none of {', '.join(_KINDS)} to say its kind"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Whatever its many parsers raise, the folder is to blame.
    except Exception as error:
        reason = first_line(error)
        if importlib.util.find_spec("sentencepiece") is None and any(folder.glob("*.model")):
            reason = f"a SentencePiece model needs sentencepiece: {to_install('text')}"
        raise ConfigError(f"tokenizer folder {name} cannot be loaded: {reason}") from error


def _download(name: str) -> Path:
    """The tokenizer files of the hub id `name`, from the cache when the hub is out of reach."""
    from huggingface_hub import snapshot_download

    if name.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"tokenizer {name!r} is not 'clip', nor a folder, nor a hub id")
    try:
        return Path(snapshot_download(name, allow_patterns=[*_TOKENIZER_FILES], etag_timeout=10))
    except Exception as error:  # of the network, the hub, or the cache
        raise ConfigError(
            f"tokenizer {name!r} is not 'clip', nor a folder, and not had from the hub: "
            f"{first_line(error)}"
        ) from error
