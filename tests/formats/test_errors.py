import inspect
import re
from pathlib import Path

import pytest

from sctconv.formats import errors
from sctconv.formats.errors import CheckpointError, FormatError, MissingEntryError, OutputError, SctError

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
LEAVES = [item for item in CLASSES if item not in (SctError, FormatError, CheckpointError)]


@pytest.mark.parametrize("error", CLASSES)
def test_the_docstring_names_every_class(error):
    assert errors.__doc__ and re.search(rf"\b{error.__name__}\b", errors.__doc__)


@pytest.mark.parametrize("error", LEAVES)
def test_every_class_has_its_place_and_a_test(error):
    assert issubclass(error, (FormatError, CheckpointError)) or error is OutputError
    assert error.exit_code == 1
    tests = Path(__file__).parent.glob("test_*.py")
    assert any(re.search(rf"\b{error.__name__}\b", file.read_text()) for file in tests if file != Path(__file__))


def test_a_missing_entry_is_a_key_error_that_prints_like_any_other():
    error = MissingEntryError("no tensor 'a'")
    assert isinstance(error, KeyError) and isinstance(error, FormatError)
    assert str(error) == "no tensor 'a'"
