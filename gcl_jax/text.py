"""Tokenizers: CLIP's byte-pair encoding, or any Hugging Face tokenizer, to fixed-length ids.

CLIP's ids equal those of open_clip's `SimpleTokenizer`: same cleaning, same word pattern, same
merges; the splitting and merging run in the Rust `tokenizers` library. (Letters of Unicode 17 and
later may be split otherwise, as they are between versions of open_clip's own `regex`.)
"""

import gzip
import html
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources

import ftfy
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from gcl_jax.errors import ConfigError

CLIP_START, CLIP_END = "<start_of_text>", "<end_of_text>"
# CLIP's pattern is case-insensitive; on lowered text that only matters for the long s, and for
# U+0345, which is no letter but folds to one, and so matches nothing.
_CLIP_WORDS = (
    r"<[sſ]tart_of_text>|<end_of_text>|'[sſtmd]|'re|'ve|'ll"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)


class Tokenizer:
    """Callable: n texts -> int32 ids (n, context_length), filled up with `pad_id`.

    Longer texts are cut, keeping the final special tokens. Pickles as its name, so that worker
    processes rebuild it. `load_tokenizer` makes one.

    Attributes:
      name, context_length: as given to `load_tokenizer`.
      vocab_size: ids lie in [0, vocab_size).
      pad_id: padding; `ids != pad_id` is the attention mask of a Hugging Face tower. CLIP's is 0,
        a real token too, but its causal tower reads the end token, the highest id (argmax).
    """

    def __init__(
        self,
        name: str,
        context_length: int,
        vocab_size: int,
        pad_id: int,
        encode: Callable[[list[str]], list[list[int]]],
    ):
        self.name, self.context_length = name, context_length
        self.vocab_size, self.pad_id = vocab_size, pad_id
        self._encode = encode

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = self._encode(texts) if texts else []
        return np.array(ids, np.int32).reshape(len(texts), self.context_length)

    def __reduce__(self):
        return load_tokenizer, (self.name, self.context_length)


@lru_cache
def load_tokenizer(name: str, context_length: int) -> Tokenizer:
    """Returns the tokenizer `name`: "clip", or a folder or hub id that transformers can load.

    Args:
      name: "clip" is the vocabulary of OpenAI's CLIP, bundled. An empty text gives start and end
        token only. Others are used as they are: no cleaning, no "query: " prefix.
      context_length: columns of the ids, special tokens included.

    Raises:
      ConfigError: context_length < 2, tokenizer not found, or one without a padding token.
    """
    if context_length < 2:
        raise ConfigError(f"context_length must be at least 2, not {context_length}")
    make = _clip if name == "clip" else _hugging_face
    return make(name, context_length)


def _clip(name: str, context_length: int) -> Tokenizer:
    bpe, pad_id = _clip_bpe(), 0
    bpe.enable_truncation(context_length)
    bpe.enable_padding(length=context_length, pad_id=pad_id)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in bpe.encode_batch_fast([clean(text) for text in texts])]

    return Tokenizer(name, context_length, 49408, pad_id, encode)


def clean(text: str) -> str:
    """CLIP's cleaning: mojibake fixed, HTML unescaped, blanks made one space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _clip_bpe() -> tokenizers.Tokenizer:
    """The encoder of cleaned text; vocabulary order as in CLIP: bytes, word-final bytes, merges."""
    packed = resources.files("gcl_jax") / "assets/clip_bpe/bpe_simple_vocab_16e6.txt.gz"
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


def _hugging_face(name: str, context_length: int) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and needed here only

    try:
        hf = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"tokenizer {name!r} is not 'clip' and transformers has none: {reason}"
        ) from error
    if hf.pad_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no padding token")

    def encode(texts: list[str]) -> list[list[int]]:
        options = {"padding": "max_length", "truncation": True, "max_length": context_length}
        return hf(texts, **options)["input_ids"]

    return Tokenizer(name, context_length, len(hf), hf.pad_token_id, encode)
