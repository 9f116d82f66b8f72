"""Zip archives, checked before anything extracts or loads them.

A TorchScript archive, an AOTInductor package and what ``torch.save`` writes are zip files, and a
package is unpacked into a directory by whoever loads it. The formats know neither links nor
encryption nor names outside, and hardly compress: what has any of these was not written by torch.
"""

from __future__ import annotations

import os
import stat
import zipfile
from typing import TYPE_CHECKING, Final, NoReturn

from ..errors import PathEscape, UnsafeError, UsageError
from .digest import open_regular

if TYPE_CHECKING:
    from pathlib import Path

MAX_GROWTH: Final = 4
MAX_EXTRA: Final = 64 << 20
"""An archive may unpack to :data:`MAX_GROWTH` times its size and as many bytes more. torch stores
weights as they are and compresses only code, threefold or so."""

_HINT = "do not open this file; export it again or fetch it from a source you trust"


def check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more, or to other places, than torch ever writes.

    Reads the directory of the archive alone.

    Raises:
        PathEscape: a name that is absolute, has ``..``, a backslash or a control character; a
            member that is a link, a device or a FIFO; the file itself is one.
        UnsafeError: it would unpack to far more than it holds; two members have one name, or
            share bytes; a member is encrypted; there is something before or after the archive.
        UsageError: it is no zip archive, or is truncated.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                members, comment = archive.infolist(), archive.comment
        except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
            raise UsageError(
                f"{path} is no zip archive, or is truncated ({error})", hint=_HINT
            ) from error
    names = set()
    for member in members:
        _check_name(path, member)
        if member.filename in names:
            _refuse(f"{path} holds {member.filename} twice")
        names.add(member.filename)
        if member.flag_bits & 1:
            _refuse(f"{path} holds {member.filename} encrypted")
    if comment or (members and min(m.header_offset for m in members) != 0):
        _refuse(f"{path} holds something before or after the archive")
    if sum(member.compress_size for member in members) > size:
        _refuse(f"members of {path} share their bytes")
    unpacked, limit = sum(m.file_size for m in members), MAX_GROWTH * size + MAX_EXTRA
    if unpacked > limit:
        _refuse(f"{path}, of {size} bytes, would unpack to {unpacked}", f"{limit} bytes")


def _check_name(path: Path, member: zipfile.ZipInfo) -> None:
    # ZipInfo cuts a name at a NUL and turns the system's separators; the original counts.
    name = member.orig_filename
    parts = name.removesuffix("/").split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not any(
        character in "\\:" or not character.isprintable() for character in name
    )
    if not plain:
        raise PathEscape(
            f"{path} holds a member called {name!r}", allowed="plain names below one directory",
            hint=_HINT,
        )
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise PathEscape(
            f"{path} holds {name} as a link or a special file", allowed="files", hint=_HINT
        )


def _refuse(found: str, allowed: str = "") -> NoReturn:
    raise UnsafeError(found, allowed=allowed, hint=_HINT)
