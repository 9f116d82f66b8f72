"""Asking again: with growing pauses, only where it can help, and without telling secrets."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from typing import TYPE_CHECKING, TypeVar

from ..errors import DestinationUnreachable, DigestMismatch, ModelportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE = 0.25
"""Seconds before the second attempt; doubled each time, with jitter: 4 to 12 s for all."""

_LIBRARIES = frozenset({
    "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "http", "httpcore",
    "httpcore2", "httpx", "httpx2", "huggingface_hub", "paramiko", "requests", "urllib3",
})
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError,
          NotADirectoryError)
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG})
_SECRET = re.compile(
    r"(?i)(authorization|token|secret|password|signature|credential|api[-_]?key|sig)"
    r"(['\"]?\s*[=:]\s*['\"]?)(bearer\s+|basic\s+)?[^\s&'\",;)]+"
)
_SECRET_NAMES = re.compile(r"(?i)token|secret|password|access_key|credential|api_key")
_USERINFO = re.compile(r"(://)[^/\s@]*:[^/\s@]*@")


class Transient(Exception):
    """Raised by a destination for an answer that may be another one next time, such as a 503."""


def patiently(what: str, call: Callable[[], T]) -> T:
    """Call until it succeeds, fails for good, or has failed :data:`ATTEMPTS` times.

    Args:
        what: what is being done, for the message.

    Raises:
        DestinationUnreachable: it kept failing, or access was refused.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except PermissionError as error:
            if error.filename is not None and error.errno is not None:
                raise  # a local file: the disk's refusal is told by the caller
            raise DestinationUnreachable(
                f"{what}: access was refused ({told(error)})",
                allowed="credentials in the environment or the tool's own configuration",
            ) from None
        except NotImplementedError as error:
            raise UsageError(
                f"{what}: this kind of place cannot do that ({told(error)})",
                hint="publish to file, oci, hf, s3, gs, az or sftp",
            ) from error
        except Exception as error:
            if not transient(error):
                raise
            if attempt == ATTEMPTS and "checksum" in type(error).__name__.lower():
                raise DigestMismatch(
                    f"{what}: what arrives is damaged ({told(error)})",
                    hint="publish it again with --resend, which replaces damaged files",
                ) from None
            if attempt == ATTEMPTS:
                # `from None`: a library's traceback may hold headers and signed URLs.
                raise DestinationUnreachable(
                    f"{what} failed {ATTEMPTS} times ({told(error)})",
                    hint="run the same command again: what has arrived is not sent again",
                ) from None
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause *= 2
    raise AssertionError("unreachable")


def transient(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, Transient):
        return True
    if isinstance(error, (ModelportError, *_FINAL)):
        return False
    if isinstance(error, OSError) and error.errno in _DISK:
        return False
    # adlfs and the hub's client wrap what they were answered into a plain RuntimeError.
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return isinstance(error, OSError | EOFError) or _library(cause or error) in _LIBRARIES


def told(error: BaseException) -> str:
    """An error's kind and first line, with everything removed that could be a secret."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return redacted(text)[:300]


def redacted(text: str) -> str:
    """A text without the secrets of this environment and what looks like one."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return _SECRET.sub(r"\1\2***", _USERINFO.sub(r"\1***@", text))


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
