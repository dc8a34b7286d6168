import numpy as np
import pytest

from sctconv.formats.dtypes import DTYPES, FLOATS, dtype_name, numpy_dtype
from sctconv.formats.errors import DTypeError


@pytest.mark.parametrize("name", DTYPES)
def test_names_and_dtypes_are_a_bijection(name):
    assert dtype_name(numpy_dtype(name)) == name
    assert list(DTYPES.values()).count(numpy_dtype(name)) == 1


@pytest.mark.parametrize(
    ("name", "itemsize"),
    [("F64", 8), ("F32", 4), ("F16", 2), ("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U64", 8), ("BOOL", 1)],
)
def test_sizes(name, itemsize):
    assert numpy_dtype(name).itemsize == itemsize


def test_a_big_endian_dtype_has_the_name_of_its_twin():
    assert dtype_name(np.dtype(">f4")) == "F32"
    assert dtype_name(np.dtype(">i8")) == "I64"


@pytest.mark.parametrize("name", ["F99", "f32", "", "float32", "F" * 5000])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(DTypeError, match=r"unknown dtype .*this version knows F64, F32") as caught:
        numpy_dtype(name)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", ["c8", "S4", "U4", "O", "M8[s]", [("a", "f4")]])
def test_an_unstorable_dtype_is_refused(dtype):
    with pytest.raises(DTypeError, match="cannot be stored; storable are F64, F32"):
        dtype_name(np.dtype(dtype))


def test_weights_may_have_the_wide_floats():
    assert set(DTYPES) > FLOATS == {"F64", "F32", "F16", "BF16"}
