"""Git LFS leaves a pointer in place of a large file that it has not fetched."""

from pathlib import Path

from moepp.errors import UsageError

BEGIN = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises UsageError for a pointer; what is not there is for others to miss."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(BEGIN)) == BEGIN:
                raise UsageError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
