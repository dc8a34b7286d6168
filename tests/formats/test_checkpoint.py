from pathlib import Path

import numpy as np
import pytest

from sctconv.formats.checkpoint import TensorInfo, check_shard, read_tensor
from sctconv.formats.errors import CorruptShardError, MissingFileError


class Fixed:
    """A checkpoint of one tensor, of six entries as it says, that yields what it is given."""

    def __init__(self, *chunks):
        self.tensors = {"x": TensorInfo("F32", (2, 3), Path("shard"))}
        self.chunks = lambda name: iter(chunks)


def test_chunks_make_a_tensor():
    first, second = np.arange(4, dtype="<f4"), np.arange(4, 6, dtype="<f4")
    assert read_tensor(Fixed(first, second), "x").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_tensor(Fixed(first, second), "x").dtype == np.float32
    assert read_tensor(Fixed(first, second), "x", np.float16).dtype == np.float16


@pytest.mark.parametrize(("chunks", "found"), [((), 0), ((np.ones(5),), 5), ((np.ones(3), np.ones(2)), 5)])
def test_chunks_that_do_not_fill_the_shape_are_refused(chunks, found):
    with pytest.raises(CorruptShardError, match=f"shard: tensor x has {found} entries, not the 6 of its shape"):
        read_tensor(Fixed(*chunks), "x")


def test_a_shard_is_measured_by_its_first_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"GGUF and more")
    assert check_shard(path) == check_shard(path, magic=b"GGUF") == 13
    with pytest.raises(CorruptShardError, match="not the kind of file that its name says, but a GGUF file"):
        check_shard(path, magic=b"PK")
    with pytest.raises(MissingFileError, match=r"cannot be read \(Is a directory\)"):
        check_shard(tmp_path)
