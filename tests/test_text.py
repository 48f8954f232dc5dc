"""Tokenizers: CLIP's ids equal open_clip's, recorded and live; Hugging Face ids transformers'."""

import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import parity
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from gcl_jax.errors import ConfigError
from gcl_jax.text import load_tokenizer

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
def open_clip():
    """open_clip's tokenizer of ViT-B-32."""
    try:
        return parity.import_open_clip().get_tokenizer("ViT-B-32")
    except ImportError:
        pytest.skip("the [parity] extra is not installed")


@pytest.mark.parametrize("context_length", [3, 16, 77])
def test_clip_ids_equal_live_open_clip(open_clip, context_length):
    expected = open_clip(TEXTS, context_length=context_length)
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
def test_any_text_equals_live_open_clip(open_clip, clip, text):
    expected = open_clip([text])
    np.testing.assert_array_equal(clip([text]), expected.numpy(), err_msg=repr(text))


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


def test_errors_are_one_line(word_level, tmp_path):
    cases = [
        ("clip", 1, "context_length"),
        (word_level(), 4, "no padding token"),
        (str(tmp_path / "absent"), 4, "not 'clip'"),
    ]
    for name, context_length, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            load_tokenizer(name, context_length)
        assert "\n" not in str(error.value)
