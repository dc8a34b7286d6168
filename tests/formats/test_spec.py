"""SPEC.md against the code: its numbers, and the tests that it names."""

import re
from pathlib import Path

import pytest
import xxhash

from sctconv.formats import dtypes, index, layout

SPEC = (Path(layout.__file__).parent / "SPEC.md").read_text()


def test_the_tests_that_it_names_exist():
    named = set(re.findall(r"`(test_\w+)`", SPEC))
    code = "".join(file.read_text() for file in Path(__file__).parent.parent.rglob("test_*.py"))
    assert len(named) > 20
    assert named <= set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))


def test_its_dtypes_are_the_codes():
    table = SPEC[SPEC.index("| dtype | bytes | element |") :].split("\n\n")[0].splitlines()[2:]
    sizes: dict[str, str] = {}
    for _, names, counts, *_ in (row.split("|") for row in table):
        found = re.findall(r"`(\w+)`", names)
        sizes |= dict(zip(found, (counts.split() * len(found))[: len(found)], strict=True))
    assert sizes == {name: str(dtype.itemsize) for name, dtype in dtypes.DTYPES.items()}


@pytest.mark.parametrize(
    "text",
    [
        f"`{layout._HEAD.format}`",
        f"`{layout._TAIL.format}`",
        f"`{layout.MAGIC.hex(' ').upper()}`",
        f"`{layout.TAIL_MAGIC.decode()}`",
        f"version {layout.MAJOR}.{layout.MINOR}",
        f"at most 2^{layout.MAX_INDEX_BYTES.bit_length() - 1} (64 MiB)",
        f"at most 2^{layout.MAX_ENTRIES.bit_length() - 1}",
        f"128 to 2^{layout.MAX_BYTES.bit_length() - 1}",
        f"at most {layout.MAX_DIMENSIONS}, each 0 to",
        f"1 to {layout.MAX_NAME_BYTES} bytes",
        f"more than {layout.MAX_NESTING} levels",
        f"`{layout._FILE_NAME.pattern}`",
        f"`{xxhash.xxh3_64_hexdigest(b'')}`",
    ],
)
def test_its_numbers_are_the_codes(text):
    assert text in SPEC


@pytest.mark.parametrize("entry", [index.TensorEntry, index.LayerRecord, index.FileEntry, index.Index])
def test_its_keys_are_the_codes(entry):
    names = {field for field in entry.__dataclass_fields__ if field != "extra"}
    assert all(f"`{name.rstrip('_')}`" in SPEC for name in names)
