"""Every way a file can be wrong, as a tree of exceptions.

The message of each is one line that names the thing, the numbers and the way out; the command line prints it as it
is and exits with `exit_code`.

    SctError                          something the user can put right
    ├── OutputError                   the target cannot be written: exists, no space, no permission
    ├── FormatError                   a .sct file is not what it claims to be
    │   ├── NotSctError               another kind of file
    │   ├── VersionError              written by a newer, incompatible format
    │   ├── FeatureError              needs a feature this reader does not have
    │   ├── TruncatedError            shorter than its own head or tail says
    │   ├── TrailingDataError         longer than its own head says
    │   ├── IncompleteError           a conversion that was not finished
    │   ├── HeadError, TailError      reserved bytes set, impossible sizes
    │   ├── IndexChecksumError        the index is not what was written
    │   ├── IndexSyntaxError          the index is not the JSON that the format allows
    │   ├── IndexSchemaError          a key is missing or of the wrong type
    │   ├── LimitError                a count, length or nesting beyond the format's limits
    │   ├── ForbiddenNameError        a tensor, layer or file name that the format forbids
    │   ├── DuplicateNameError        one name twice
    │   ├── DTypeError                an unknown dtype
    │   ├── ShapeError                shape, dtype and byte count disagree
    │   ├── BlobBoundsError           a blob outside the data area or off its alignment
    │   ├── BlobLayoutError           blobs overlap or leave holes
    │   ├── LayerError                a factored layer's record disagrees with its tensors
    │   ├── ChecksumError             a blob is not what was written
    │   └── MissingEntryError         asked for a tensor or file that is not there
    └── CheckpointError               a dense checkpoint cannot be read
        ├── MissingFileError          a file or shard is not there
        ├── LFSPointerError           a git-lfs pointer stands where the weights should be
        ├── TruncatedShardError       a shard is shorter than its header says
        ├── CorruptShardError         a shard or an index cannot be parsed or contradicts itself
        ├── UnsupportedCheckpointError  readable, but of a kind that is not supported
        └── HubError                  the Hub lacks or refuses it (sctconv.sources.hub_errors)
"""

from __future__ import annotations

from typing import ClassVar


class SctError(Exception):
    """Something the user can put right; `str()` is one line, `exit_code` the process's status."""

    exit_code: ClassVar[int] = 1


class OutputError(SctError):
    """The output cannot be written."""


class FormatError(SctError):
    """A .sct file is not what it claims to be."""


class NotSctError(FormatError):
    """The file is of another kind."""


class VersionError(FormatError):
    """The file's major version is not this reader's."""


class FeatureError(FormatError):
    """The file requires a feature that this reader does not have."""


class TruncatedError(FormatError):
    """The file is shorter than it says."""


class TrailingDataError(FormatError):
    """The file is longer than it says."""


class IncompleteError(FormatError):
    """The file holds a conversion that was not finished."""


class HeadError(FormatError):
    """The head's reserved bytes or sizes are impossible."""


class TailError(FormatError):
    """The tail's reserved bytes or sizes are impossible."""


class IndexChecksumError(FormatError):
    """The index does not match the sha256 in the tail."""


class IndexSyntaxError(FormatError):
    """The index is not the JSON that the format allows."""


class IndexSchemaError(FormatError):
    """A key of the index is missing or of the wrong type."""


class LimitError(FormatError):
    """A count, length or nesting beyond the format's limits."""


class ForbiddenNameError(FormatError):
    """A name that the format forbids."""


class DuplicateNameError(FormatError):
    """One name twice."""


class DTypeError(FormatError):
    """An unknown dtype."""


class ShapeError(FormatError):
    """Shape, dtype and byte count disagree."""


class BlobBoundsError(FormatError):
    """A blob lies outside the data area or off its alignment."""


class BlobLayoutError(FormatError):
    """Blobs overlap or leave holes."""


class LayerError(FormatError):
    """A factored layer's record disagrees with its tensors."""


class ChecksumError(FormatError):
    """A blob is not what was written."""


class MissingEntryError(FormatError, KeyError):
    """A tensor or embedded file is not in the file."""

    __str__ = Exception.__str__  # KeyError's would print the message in quotes


class CheckpointError(SctError):
    """A dense checkpoint cannot be read."""


class MissingFileError(CheckpointError):
    """A file or shard is not there."""


class LFSPointerError(CheckpointError):
    """A git-lfs pointer stands where the weights should be."""


class TruncatedShardError(CheckpointError):
    """A shard is shorter than its header says."""


class CorruptShardError(CheckpointError):
    """A shard or an index cannot be parsed or contradicts itself."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is readable, but of a kind that is not supported."""
