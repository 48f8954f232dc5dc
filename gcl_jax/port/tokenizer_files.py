"""Tokenizer files beside exported weights."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gcl_jax.config import TextConfig
from gcl_jax.data.tokenizer import clip_bpe, load_hugging_face

_CLIP_WORDS = 49406
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def write_tokenizer(text: TextConfig, folder: Path) -> None:
    """Writes the tokenizer of `text` so that `AutoTokenizer.from_pretrained(folder)` loads it.

    CLIP's is made from the bundled vocabulary. It does not mend mojibake nor HTML entities, as ours
    and open_clip's do, and pads with its end token, behind which CLIP does not look.

    Raises:
        ConfigError: the tokenizer is not to be had.
    """
    if text.tokenizer == "clip":
        _write_clip(folder, text.context_length)
        return
    load_hugging_face(text.tokenizer).save_pretrained(folder)


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(ids, merges) under OpenAI's names, without what our encoder adds for its special tokens."""
    model = json.loads(clip_bpe().to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)[:_CLIP_WORDS]
    merges = [tuple(pair) for pair in model["merges"][: _CLIP_WORDS - 2 * 256]]
    return {token: i for i, token in enumerate([*words, _START, _END])}, merges


def _write_clip(folder: Path, context_length: int) -> None:
    ids, merges = _clip_vocabulary()
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=_END, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(
        (_END, ids[_END]), (_START, ids[_START]), trim_offsets=False, add_prefix_space=False
    )
    bpe.add_special_tokens([_START, _END])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
