"""Files whose index is wrong while every hash is right, each beside a twin that opens."""

from __future__ import annotations

import math

import pytest

from sctconv.formats.errors import (
    BlobBoundsError,
    BlobLayoutError,
    DTypeError,
    DuplicateNameError,
    FeatureError,
    ForbiddenNameError,
    IndexSchemaError,
    LayerError,
    LimitError,
    ShapeError,
)
from sctconv.formats.reader import SctFile

TOP = ["complete", "files", "layers", "metadata", "required_features", "tensors"]
KEYS = {
    ("tensors", "tied"): {"name": str, "dtype": str, "shape": list, "offset": int, "nbytes": int, "xxh3": str},
    ("layers", "l"): {
        **{"name": str, "out": int, "in": int, "rank": int, "dtype": str},
        **{"energy": float, "error": float, "bias": str},
    },
    ("files", "config.json"): {"name": str, "offset": int, "nbytes": int, "sha256": str},
}
WRONG = {str: 1, list: {}, int: "1", float: "1", dict: [], bool: 1}


@pytest.mark.parametrize("key", TOP)
def test_a_missing_or_mistyped_part_is_refused(refused, parts, key):
    refused(parts, IndexSchemaError, f"{key!r} of the index is str", {(key,): "x"})
    refused(parts, IndexSchemaError, f"the index lacks {key!r}", {(key,): ...})


@pytest.mark.parametrize(("path", "key"), [(path, key) for path, keys in KEYS.items() for key in keys])
def test_a_missing_or_mistyped_key_is_refused(refused, parts, path, key):
    part, name = path
    what = f"a {part[:-1]} entry" if key == "name" else f"the {part[:-1]} {name}"
    place = (part, parts.at(part).index(parts.at(*path)), key)
    wrong = WRONG[KEYS[path][key]]
    refused(parts, IndexSchemaError, f"'{key}' of {what} is {type(wrong).__name__}", {place: wrong})
    refused(parts, IndexSchemaError, f"'{key}' of {what} is bool", {place: True})
    refused(parts, IndexSchemaError, f"{what} lacks '{key}'", {place: ...})


@pytest.mark.parametrize("part", ["tensors", "layers", "files"])
def test_an_entry_that_is_no_object_is_refused(refused, parts, part):
    refused(parts, IndexSchemaError, f"a {part[:-1]} entry is list, not an object", {(part, "+"): []})


U, S, TIED, TIED_TOO = (("tensors", name) for name in ("l.U", "l.s", "tied", "tied too"))
L, FILE = ("layers", "l"), ("files", "config.json")
BIG = 1 << 60


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        # names
        pytest.param({(*TIED, "name"): ""}, ForbiddenNameError, "the name '' is empty", id="empty name"),
        pytest.param({(*TIED, "name"): "a\nb"}, ForbiddenNameError, r"'a\\nb' .* control character", id="newline"),
        pytest.param({(*TIED, "name"): "\x1b[2J"}, ForbiddenNameError, "control character", id="escape sequence"),
        pytest.param({(*TIED, "name"): "\x9b2J"}, ForbiddenNameError, "control character", id="C1 control"),
        pytest.param({(*TIED, "name"): "a\u2028b"}, ForbiddenNameError, "control character", id="line separator"),
        pytest.param({(*TIED, "name"): "a" * 1025}, LimitError, "is over 1024 bytes", id="long name"),
        pytest.param({(*TIED, "name"): "ä" * 513}, LimitError, "is over 1024 bytes", id="long in bytes"),
        pytest.param(
            {(*TIED, "name"): "tied too"}, DuplicateNameError, "tensor tied too stands twice", id="tensor twice"
        ),
        pytest.param({(*L, "name"): "l\t"}, ForbiddenNameError, "control character", id="layer name"),
        pytest.param({(*L, "bias"): "b\0"}, ForbiddenNameError, "control character", id="bias name"),
        # dtypes, shapes and sizes
        pytest.param({(*TIED, "dtype"): "F4"}, DTypeError, "tensor tied: unknown dtype 'F4'", id="dtype"),
        pytest.param(
            {(*TIED, "dtype"): "I\n16"}, DTypeError, r"tensor tied: unknown dtype 'I\\n16'", id="dtype newline"
        ),
        pytest.param({(*TIED, "shape"): [2, 4]}, ShapeError, r"12 bytes, but \[2, 4\] of I16 takes 16", id="shape"),
        pytest.param({(*TIED, "nbytes"): 13}, ShapeError, "13 bytes, but .* takes 12", id="nbytes"),
        pytest.param({(*TIED, "shape"): [-2, -3]}, ShapeError, "not a list of sizes", id="negative sizes"),
        pytest.param({(*TIED, "shape"): [0, 3]}, ShapeError, "takes 0", id="zero size"),
        pytest.param({(*TIED, "shape"): [2.0, 3]}, ShapeError, "not a list of sizes", id="float size"),
        pytest.param({(*TIED, "shape"): [True, 6]}, ShapeError, "not a list of sizes", id="bool size"),
        pytest.param({(*TIED, "shape"): [BIG + 1]}, ShapeError, "not a list of sizes", id="size beyond"),
        pytest.param(
            {(*TIED, "shape"): [1 << 32, 1 << 32], (*TIED, "nbytes"): 0}, ShapeError, "over", id="product 2^64"
        ),
        pytest.param({(*TIED, "shape"): [BIG] * 8}, ShapeError, f"over {BIG} bytes", id="product 2^480"),
        pytest.param(  # in 64 bits the product wraps to the 12 bytes that are there
            {(*TIED, "shape"): [6, 5, 922337203685477581]}, ShapeError, "over", id="product wraps to nbytes"
        ),
        pytest.param({("tensors", "empty", "shape"): [0, BIG, BIG]}, ShapeError, "over", id="product with a zero"),
        pytest.param({(*TIED, "shape"): [6] + [1] * 8}, LimitError, "tensor tied: 9 dimensions; at most 8", id="dims"),
        pytest.param({(*TIED, "shape"): [1] * 100_000}, LimitError, "tied: 100000 dimensions", id="dims huge"),
        # places
        pytest.param(
            {(*TIED, "offset"): -64}, BlobBoundsError, r"tied: its blob at -64\+12 is not a place", id="negative"
        ),
        pytest.param({(*TIED, "offset"): 0}, BlobBoundsError, "tied: its blob at 0", id="in the head"),
        pytest.param({(*U, "offset"): 96}, BlobBoundsError, r"l\.U: its blob at 96", id="off alignment"),
        pytest.param(
            {(*TIED, "offset"): 512}, BlobBoundsError, "tied: its blob ends at 524, past 512", id="past the end"
        ),
        pytest.param({(*TIED, "offset"): BIG}, BlobBoundsError, "past 512", id="far past the end"),
        pytest.param({(*TIED, "offset"): (1 << 64) - 64}, BlobBoundsError, "past 512", id="offset wraps"),
        pytest.param({(*FILE, "nbytes"): -1}, BlobBoundsError, r"config\.json: .*448\+-1", id="negative file"),
        pytest.param(
            {(*FILE, "nbytes"): 65}, BlobBoundsError, r"config\.json: its blob ends at 513", id="file too long"
        ),
        pytest.param(
            {(*FILE, "nbytes"): (1 << 64) - 64}, BlobBoundsError, "448\\+18446744073709551552", id="end wraps"
        ),
        pytest.param({(*FILE, "nbytes"): 0}, BlobLayoutError, "the blobs end at 448", id="file of nothing"),
        pytest.param(
            {(*S, "offset"): 64}, BlobLayoutError, r"l\.U: its blob at 64 overlaps .* ends at 72", id="overlap"
        ),
        pytest.param({(*TIED_TOO, "shape"): [6]}, BlobLayoutError, "overlaps", id="shared, other shape"),
        pytest.param({(*TIED_TOO, "xxh3"): "0" * 16}, BlobLayoutError, "overlaps", id="shared, other sum"),
        pytest.param({(*S, "offset"): 192}, BlobLayoutError, "leaves a hole after", id="hole"),
        pytest.param(
            {("files",): []}, BlobLayoutError, "the blobs end at 392, but the index begins at 512", id="hole at end"
        ),
        # layers
        pytest.param({(*L, "rank"): 4}, LayerError, "rank 4 does not fit a layer of 4 x 3", id="rank"),
        pytest.param({(*L, "rank"): 0}, LayerError, "rank 0 does not fit", id="rank 0"),
        pytest.param({(*L, "out"): 0}, LayerError, "rank 2 does not fit a layer of 0 x 3", id="out 0"),
        pytest.param({(*L, "in"): 0, (*L, "rank"): 0}, LayerError, "rank 0 does not fit a layer of 4 x 0", id="in 0"),
        pytest.param({(*L, "out"): -4}, LayerError, "layer of -4 x 3", id="negative out"),
        pytest.param({(*L, "in"): 5}, LayerError, r"l\.V should be F32 \[5, 2\], but is F32 \[3, 2\]", id="in"),
        pytest.param({(*L, "name"): "m"}, LayerError, r"m\.U should be F32 \[4, 2\], but is missing", id="no factors"),
        pytest.param({(*L, "dtype"): "BF16"}, LayerError, r"l\.U should be BF16", id="layer dtype"),
        pytest.param({(*L, "dtype"): "I8\n"}, LayerError, r"factors of dtype 'I8\\n'; they may be BF16", id="no float"),
        pytest.param({(*L, "bias"): "scalar"}, LayerError, "bias 'scalar' is not a tensor of 4", id="bias"),
        pytest.param({(*L, "bias"): "missing"}, LayerError, "bias 'missing' is not", id="no bias"),
        pytest.param({(*L, "energy"): 1.5}, LayerError, r"energy 1\.5 is out of range", id="energy"),
        pytest.param({(*L, "error"): -1}, LayerError, "error -1 is out of range", id="error"),
        pytest.param({("layers", "+"): {**{"name": "l"}}}, IndexSchemaError, "layer l lacks", id="layer half"),
        # keys
        pytest.param(
            {(*TIED, "xxh3"): ..., (*TIED, "new"): 1}, IndexSchemaError, "tied lacks 'xxh3'", id="unknown for known"
        ),
        # features
        pytest.param({("required_features", "+"): "journal"}, FeatureError, r"\('journal'\); update", id="feature"),
        pytest.param({("required_features",): ["f\n"] * 9000}, FeatureError, "needs 9000 features", id="features"),
        pytest.param({("required_features", "+"): 1}, IndexSchemaError, "not a list of names", id="feature no name"),
        # checksums
        pytest.param({(*TIED, "xxh3"): "g" * 16}, IndexSchemaError, "not 16 lower-case hex digits", id="no hex"),
        pytest.param({(*TIED, "xxh3"): "A" * 16}, IndexSchemaError, "not 16 lower-case", id="upper case"),
        pytest.param({(*FILE, "sha256"): "0" * 63}, IndexSchemaError, "not 64 lower-case", id="short sha256"),
    ],
)
def test_an_impossible_entry_is_refused(refused, parts, edits, error, message):
    refused(parts, error, message, edits)


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param({}, id="as it is"),
        pytest.param({(*TIED, "name"): "a" * 1024}, id="1024 bytes"),
        pytest.param({(*TIED, "name"): "層.0/重み é"}, id="unicode"),
        pytest.param({(*TIED, "shape"): [1, 1, 1, 1, 1, 1, 2, 3], (*TIED_TOO, "shape"): [1] * 6 + [2, 3]}, id="8-d"),
        pytest.param({("tensors", "empty", "shape"): [0, 1 << 40]}, id="empty and wide"),
        pytest.param({(*L, "energy"): None, (*L, "error"): None, (*L, "bias"): None}, id="nulls"),
        pytest.param({(*L, "energy"): 1, (*L, "error"): 0}, id="integers for floats"),
        pytest.param({("layers",): []}, id="no layers"),
        pytest.param(
            {("new",): {"a": [1]}, (*L, "new"): 1, (*TIED, "new"): None, (*FILE, "new"): ""}, id="unknown keys"
        ),
    ],
)
def test_a_possible_one_opens(save, parts, edits):
    with SctFile(save(parts, edits)) as file:
        for name, entry in file.index.tensors.items():
            file.verify(entry)
            assert file.tensor(name).size == math.prod(entry.shape)


PATHS = ["..", "../a", "a/b", "/etc/passwd", "a\\b", "C:\\a"]


@pytest.mark.parametrize("name", [*PATHS, "", ".", ".hidden", "-rf", "a b", "a\0", "a\n", "é.json", "a" * 256])
def test_a_file_name_that_is_a_path_or_worse_is_refused(refused, parts, name):
    refused(parts, ForbiddenNameError, "an embedded file may not be called", {(*FILE, "name"): name})


@pytest.mark.parametrize("name", ["a", "tokenizer_config.json", "a-b.1", "_", "a..b", "a" * 255])
def test_a_plain_file_name_opens(save, parts, name):
    with SctFile(save(parts, {(*FILE, "name"): name})) as file:
        assert file.file(name).startswith(b"{")


def test_huge_counts_are_refused_before_any_entry_is_read(refused, parts):
    for part in ("tensors", "layers", "files"):
        refused(parts, LimitError, f"262145 {part[:-1]} entries; at most 262144", {(part,): [0] * 262145})
        parts.index[part] = []


@pytest.mark.parametrize(("part", "name"), [("layers", "l"), ("files", "config.json")])
def test_a_layer_or_file_that_stands_twice_is_refused(refused, parts, part, name):
    refused(parts, DuplicateNameError, f"{name} stands twice", {(part, "+"): parts.at(part, name)})
