"""File locks, done without where the file system has none: then leases, random names and renames must do."""

import errno
from collections.abc import Callable
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def locked(lock: Callable[[IO, int], None], file: IO, how: int) -> bool:
    """Whether `lock` (`fcntl.flock` or `fcntl.lockf`) was granted as `how` says; False where the file system has no
    locks. Raises the OSError of `lock` where another holds it and `how` does not wait.
    """
    try:
        lock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
