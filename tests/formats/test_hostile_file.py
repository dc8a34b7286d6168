"""Files whose head, tail or length is wrong, each beside a twin that opens."""

from __future__ import annotations

import random
import struct

import pytest

from sctconv.formats.errors import (
    BlobLayoutError,
    ChecksumError,
    FormatError,
    HeadError,
    IncompleteError,
    IndexChecksumError,
    IndexSyntaxError,
    LimitError,
    NotSctError,
    TailError,
    TrailingDataError,
    TruncatedError,
    VersionError,
)
from sctconv.formats.layout import MAGIC
from sctconv.formats.reader import SctFile, is_sct

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
SAFETENSORS = struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"' + b" " * 40
HTML = b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "an empty file", id="empty"),
        pytest.param(LFS, "a git-lfs pointer; fetch the file itself with `git lfs pull`", id="git-lfs"),
        pytest.param(b"GGUF\x03" + bytes(60), "a GGUF file; `sctconv convert`", id="gguf"),
        pytest.param(b"PK\x03\x04" + bytes(60), "a zip archive, perhaps a torch .bin", id="zip"),
        pytest.param(SAFETENSORS, "perhaps a safetensors file", id="safetensors"),
        pytest.param(HTML, "an HTML page, perhaps an error page", id="html"),
        pytest.param(b"Once upon a time\r\n", "a text file", id="text"),
        pytest.param(b"a", "a text file", id="one letter"),
        pytest.param(bytes(200), "something else", id="zeros"),
        pytest.param(
            MAGIC.replace(b"\r\n", b"\n") + bytes(60), "a .sct file damaged by a transfer in text mode", id="text mode"
        ),
    ],
)
def test_another_kind_of_file_is_named(refused, save, content, message):
    refused(content, NotSctError, f"not a .sct file, but {message}")
    assert not is_sct(save(content))


def test_the_file_itself_opens(save, parts):
    path = save(parts)
    assert is_sct(path)
    with SctFile(path) as file:
        assert set(file.index.layers) == {"l"}


def test_what_is_not_there_or_no_file_is_no_sct(tmp_path):
    assert not is_sct(tmp_path)
    assert not is_sct(tmp_path / "missing")
    with pytest.raises(OSError, match="No such file"):
        SctFile(tmp_path / "missing")


END = 64 + 64 * 7  # where the sample's index begins


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        pytest.param({"major": 2}, VersionError, r"version 2\.0; this reader knows 1\.x; update", id="major 2"),
        pytest.param({"major": 0, "minor": 9}, VersionError, r"version 0\.9", id="major 0"),
        pytest.param({"head_reserved": 1}, HeadError, "reserved bytes", id="head flags"),
        pytest.param({"head_rest": bytes(39) + b"\1"}, HeadError, "reserved bytes", id="head rest"),
        pytest.param({"committed": 127}, HeadError, "size of 127 bytes", id="committed tiny"),
        pytest.param({"committed": (1 << 60) + 1}, HeadError, "size of 1152921504606846977", id="committed beyond"),
        pytest.param({"committed": 1 << 60}, TruncatedError, r"cut: \d+ of 1152921504606846976", id="committed huge"),
        pytest.param({"committed": 0}, TruncatedError, "nothing was ever committed", id="never committed"),
        pytest.param({"committed": 128}, TailError, "no tail at the committed end", id="committed early"),
        pytest.param({"tail_magic": b"SCT-TAIK"}, TailError, "no tail", id="tail magic"),
        pytest.param({"tail_reserved": bytes(7) + b"\1"}, TailError, "no tail", id="tail reserved"),
        pytest.param({"index_offset": END - 64}, TailError, f"the index at {END - 64}", id="index early"),
        pytest.param({"index_offset": (1 << 64) - 1}, TailError, "18446744073709551615", id="index offset wraps"),
        pytest.param({"index_offset": 0}, TailError, "the index at 0", id="index in the head"),
        pytest.param({"index_nbytes": 0}, TailError, f"the index at {END}", id="index size"),
        pytest.param({"index_nbytes": (64 << 20) + 1}, LimitError, "67108865 bytes; at most 67108864", id="index big"),
        pytest.param({"index_nbytes": (1 << 64) - 1}, LimitError, "18446744073709551615 bytes", id="index huge"),
        pytest.param({"sha256": bytes(range(32))}, IndexChecksumError, "does not match its sha256", id="sha256"),
        pytest.param({"index_text": b""}, IndexSyntaxError, "not valid JSON", id="no index"),
        pytest.param({"trailing": b"\0"}, TrailingDataError, "1 bytes follow its end", id="trailing"),
        pytest.param({("complete",): False}, IncompleteError, "not finished; go on with", id="incomplete"),
    ],
)
def test_a_wrong_head_or_tail_is_refused(refused, parts, edits, error, message):
    refused(parts, error, message, edits)


def test_an_index_that_begins_in_the_head_is_refused(refused, parts):
    nbytes = len(parts.build()) - 64
    refused(parts, TailError, rf"the index at 0\+{nbytes}", {"index_offset": 0, "index_nbytes": nbytes})


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param({"minor": 7}, id="higher minor"),
        pytest.param({"minor": 1, "head_reserved": 5, "head_rest": b"\1" * 40}, id="higher minor, reserved bytes"),
    ],
)
def test_a_higher_minor_version_opens(save, parts, edits):
    with SctFile(save(parts, edits)) as file:
        assert file.head.minor == edits["minor"]
        assert file.tensor("l.s").tolist() == [3.0, 1.0]


def test_an_incomplete_file_opens_when_asked(save, parts):
    path = save(parts, {("complete",): False, "trailing": b"half a blob"})
    with pytest.raises(IncompleteError):
        SctFile(path)
    with SctFile(path, allow_incomplete=True) as file:
        assert not file.index.complete
        assert file.tensor("scalar") == 0.5


def test_an_incomplete_file_may_hold_an_index_that_a_later_one_replaced(save, parts):
    hole = parts.append(b"an older index and its tail")
    entry = {**parts.at("tensors", "scalar"), "name": "later", "offset": parts.append(struct.pack("<d", 0.5))}
    assert parts.append(b"another, after the last blob") > entry["offset"] > hole
    path = save(parts, {("complete",): False, ("tensors", "+"): entry})
    with SctFile(path, allow_incomplete=True) as file:
        assert file.tensor("later") == 0.5
    path = save(parts, {("tensors", "later", "offset"): 64})
    with pytest.raises(BlobLayoutError, match=r"l\.U: its blob at 64 overlaps"):
        SctFile(path, allow_incomplete=True)


def test_asking_for_an_incomplete_file_does_not_excuse_trailing_bytes_of_a_whole_one(save, parts):
    with pytest.raises(TrailingDataError):
        SctFile(save(parts, {"trailing": b"x"}), allow_incomplete=True)


def test_a_cut_at_any_length_is_refused(save, parts):
    whole = parts.build()
    lengths = sorted(
        {1, 7, 8, 9, 63, 64, 65, 127, 128, END, len(whole) - 65, len(whole) - 1, *range(0, len(whole), 53)}
    )
    for length in lengths[1:]:
        with pytest.raises(TruncatedError, match=f"cut.* {length} "):
            SctFile(save(whole[:length]))
    with pytest.raises(NotSctError):
        SctFile(save(b""))


def test_one_flipped_bit_is_found_wherever_it_is(save, parts):
    """On opening, or by `verify` and `verify_padding`; only the minor version says nothing that could be held."""
    whole = parts.build()
    minor = {10, 11}
    rng = random.Random(7)
    positions = {*range(64), *range(len(whole) - 64, len(whole)), *rng.sample(range(len(whole)), 500)}
    for position in sorted(positions - minor):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError), SctFile(save(bytes(spoiled))) as file:
            for blob in file.index.blobs:
                file.verify(blob)
            file.verify_padding()


def test_padding_is_checked_apart_from_the_blobs(save, parts):
    spoiled = bytearray(parts.build())
    spoiled[64 + 32] = 1  # right after l.U
    with SctFile(save(bytes(spoiled))) as file:
        for blob in file.index.blobs:
            file.verify(blob)
        with pytest.raises(ChecksumError, match="the padding at 96 is not zero"):
            file.verify_padding()
    with SctFile(save(parts)) as file:
        file.verify_padding()


@pytest.mark.parametrize(("position", "what"), [(64, "tensor l.U"), (64 + 6 * 64, "embedded file config.json")])
def test_a_damaged_blob_is_named(save, parts, position, what):
    spoiled = bytearray(parts.build())
    spoiled[position] ^= 1
    with SctFile(save(bytes(spoiled))) as file:
        entry = (file.index.tensors | file.index.files)[what.split()[-1]]
        with pytest.raises(ChecksumError, match=f"the {what} does not match its checksum"):
            file.verify(entry)


def test_a_damaged_embedded_file_is_never_handed_out(save, parts):
    spoiled = bytearray(parts.build())
    spoiled[64 + 6 * 64] ^= 1
    with SctFile(save(bytes(spoiled))) as file, pytest.raises(ChecksumError, match=r"embedded file config\.json"):
        file.file("config.json")


def test_a_file_cut_while_it_is_open_is_noticed(save, parts):
    path = save(parts)
    with SctFile(path) as file:
        path.write_bytes(path.read_bytes()[:450])
        with pytest.raises(TruncatedError, match=r"model\.sct: cut while it was open; 22 bytes at 448 are gone"):
            file.file("config.json")
