"""Tokenizers: known vectors, streaming that equals decoding, and files that lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint import making
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from support import need_shared_data, shared_data

from hasten import checkpoint
from hasten.checkpoint import Tokenizer
from hasten.errors import CheckpointError, InputError


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order (encoder.py of its release)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-2's tokenizer from its merges alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    lines = (need_shared_data("tokenizers", "gpt2_bpe") / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    vocabulary = {t: i for i, t in enumerate([*byte_alphabet(), *(a + b for a, b in merges)])}
    library = Library(BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevelDecoder()
    library.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("gpt2")
    library.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def stories() -> Tokenizer:
    """Llama 2's kind of tokenizer: sentencepiece with byte fallback."""
    return Tokenizer(need_shared_data("models", "stories260K-hf"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, whose id is the byte, some longer ones, and a special one."""
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE

    alphabet = byte_alphabet()
    printable = [ord(letter) for letter in alphabet if ord(letter) < 256]
    order = [*printable, *(b for b in range(256) if b not in printable)]
    letters = dict(zip(order, alphabet, strict=True))
    names = [letters[b] for b in range(256)]
    longer = ["".join(letters[b] for b in text.encode()) for text in ("🙂", "ab", "\ufffd")]
    library = Library(BPE(vocab={t: i for i, t in enumerate([*names, *longer])}, merges=[]))
    library.decoder = ByteLevelDecoder()
    library.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("bytes")
    library.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def byte_fallback_tokenizer(path: Path) -> Tokenizer:
    """As Llama 2's, made here: words that begin with a space, and every byte as a token."""
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
    from tokenizers.models import BPE

    words = ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "b", "▁b", "你", "é"]
    vocabulary = {t: i for i, t in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    library = Library(BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    library.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_fallback_tokenizer(tmp_path_factory.mktemp("fallback"))


def test_gpt2_vectors(gpt2: Tokenizer) -> None:
    """The vectors that llama.cpp tests its own tokenizer with."""
    folder = need_shared_data("tokenizers", "llamacpp_vocab")
    raw = (folder / "ggml-vocab-gpt-2.gguf.inp").read_bytes().decode("utf-8")
    texts = raw.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    expected = (folder / "ggml-vocab-gpt-2.gguf.out").read_text().splitlines()
    assert len(texts) == len(expected) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert gpt2.encode(text) == [int(i) for i in ids.split()], text
        assert gpt2.decode(gpt2.encode(text)) == text


def test_stories_tokens(stories: Tokenizer) -> None:
    ids = stories.encode("Once upon a time")
    assert ids == [1, 403, 407, 261, 378]
    assert stories.encode("Once upon a time", special=False) == ids[1:]
    assert stories.decode(ids) == "Once upon a time"
    assert stories.decode(ids, skip_special=False) != stories.decode(ids)
    assert (stories.bos_token_id, stories.eos_token_id, stories.vocabulary_size) == (1, 2, 512)


@pytest.mark.parametrize("text", ["", "a b", "naïve 你好 🙂\n\ttabs", "\0\x01", "e\u0301", "👩‍👩‍👧‍👦" * 3])
def test_round_trip(stories: Tokenizer, text: str) -> None:
    assert stories.decode(stories.encode(text)) == text


def assert_streams(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> None:
    stream = tokenizer.stream(skip_special)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special)


def assert_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode(text, special=False)
    pieces = [*(stream.push(i) for i in ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


ids_of = st.lists(st.integers(0, 511), max_size=60)
words = st.text(max_size=40).filter(lambda t: "\ufffd" not in t)


@settings(max_examples=60, deadline=None)
@given(ids=ids_of, skip_special=st.booleans())
def test_streaming_equals_decoding_with_byte_fallback(stories: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert_streams(stories, ids, skip_special)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 9, *range(202, 214), 10, 138, 170, 250]), max_size=60))
def test_streaming_equals_decoding_amid_stray_bytes(fallback: Tokenizer, ids: list[int]) -> None:
    assert_streams(fallback, ids)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 300) | st.integers(0, 50_256), max_size=60))
def test_streaming_equals_decoding_with_byte_level(gpt2: Tokenizer, ids: list[int]) -> None:
    assert_streams(gpt2, ids)


@settings(max_examples=60, deadline=None)
@given(text=words)
def test_streams_whole_characters_byte_level(gpt2: Tokenizer, text: str) -> None:
    assert_no_half_characters(gpt2, text)


@settings(max_examples=60, deadline=None)
@given(text=words)
def test_streams_whole_characters_byte_fallback(stories: Tokenizer, text: str) -> None:
    assert_no_half_characters(stories, text)


def test_text_is_not_held_back_needlessly(gpt2: Tokenizer) -> None:
    stream = gpt2.stream()
    pieces = [stream.push(i) for i in gpt2.encode("Hello world, 你好!")]
    assert pieces[:3] == ["Hello", " world", ","]
    assert pieces[-1] == "!"


def test_the_window_stays_short(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step decodes a few tokens, however long the text has grown."""
    stream, longest = gpt2.stream(), 0
    for i in gpt2.encode("some words and more of them, " * 100):
        stream.push(i)
        longest = max(longest, len(stream._window))
    assert longest <= stream.WINDOW + 2


stray = st.sampled_from(
    [0x41, 0x80, 0x9F, 0x98, 0xA0, 0xAC, 0xBF, 0xC3, 0xE2, 0x82, 0xED, 0xF0, 0xF4, 0xFF, 0xEF, 0xBD]
)

runs = st.builds(lambda part, count: bytes(part) * count, st.lists(stray, min_size=1, max_size=3), st.integers(1, 20))


@settings(max_examples=300, deadline=None)
@given(raw=st.lists(st.binary(max_size=3) | runs | st.just("🙂é€".encode()), max_size=30))
def test_any_bytes_stream_within_a_short_window(byte_level: Tokenizer, raw: list[bytes]) -> None:
    """Against Python's own decoder, which replaces as the library does; one token is one byte."""
    data = b"".join(raw)
    stream, pieces = byte_level.stream(), []
    for byte in data:
        pieces.append(stream.push(byte))
        assert len(stream._window) <= 16
    assert "".join(pieces) + stream.finish() == byte_level.decode(data) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("byte", [0x80, 0xF0, 0xFF, 0xED])
def test_an_endless_run_of_invalid_bytes(byte_level: Tokenizer, byte: int) -> None:
    """Each step decodes a few tokens, and all but the end of the text is given as it comes."""
    stream, given = byte_level.stream(), ""
    for count in range(1, 600):
        given += stream.push(byte)
        assert len(stream._window) <= 16
        assert len(given) >= count - 4
    assert given + stream.finish() == "\ufffd" * 599


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(stray.map(lambda b: b + 3) | st.integers(0, 270), max_size=80), skip_special=st.booleans())
def test_any_bytes_stream_with_byte_fallback(fallback: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert_streams(fallback, ids, skip_special)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(stray | st.integers(0, 262), max_size=80), skip_special=st.booleans())
def test_bytes_join_across_silent_tokens(byte_level: Tokenizer, ids: list[int], skip_special: bool) -> None:
    assert_streams(byte_level, ids, skip_special)


def test_a_lone_surrogate(stories: Tokenizer) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        stories.encode("a\ud83d")


def test_ids_beyond_the_tokenizer_give_no_text(stories: Tokenizer) -> None:
    assert stories.decode([403, 99_999, 407]) == stories.decode([403, 407])
    assert_streams(stories, [403, 99_999, 407])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no tokenizer"),
        (b"{}", "is no tokenizer"),
        (b"[1, 2]", "is no tokenizer"),
        (b'{"version": "1.0", "model": {"type": "Evil"}}', "is no tokenizer"),
        (b"\xff\xfe\x00", "is no tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


def test_truncated_tokenizer(tmp_path: Path) -> None:
    text = making.tokenizer_json()
    for cut in np.linspace(1, len(text) - 2, 12).astype(int):
        (tmp_path / "tokenizer.json").write_text(text[:cut])
        with pytest.raises(CheckpointError, match="is no tokenizer"):
            Tokenizer(tmp_path)


def test_vocabulary_that_contradicts_the_model(tmp_path: Path) -> None:
    path = making.directory(tmp_path, tiny.CONFIGS["llama"])
    assert checkpoint.open(str(path)).tokenizer.vocabulary_size == 48
    (path / "tokenizer.json").write_text(making.tokenizer_json(49))
    with pytest.raises(CheckpointError, match="tokens up to id 48, the model's vocabulary ends at 47"):
        _ = checkpoint.open(str(path)).tokenizer
    (path / "tokenizer.json").write_text(making.tokenizer_json(20))  # a padded vocabulary is usual
    assert checkpoint.open(str(path)).tokenizer.vocabulary_size == 20


def test_truncation_and_padding_stored_in_the_file_are_undone(tmp_path: Path) -> None:
    stored = json.loads(making.tokenizer_json())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert len(Tokenizer(tmp_path).encode("abcdef")) == 6


@pytest.mark.skipif(shared_data("models") is None, reason="shared data is not here")
@pytest.mark.filterwarnings("ignore")
def test_same_tokens_as_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    path = need_shared_data("models", "stories260K-hf")
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    for text in ("Once upon a time, there was", "naïve 你好", "  two  spaces ", "</s> in text"):
        assert Tokenizer(path).encode(text) == theirs(text)["input_ids"]
