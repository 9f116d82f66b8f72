"""A repository on an SSH server: ``sftp://user@host[:port]/path[:tag]``.

The key comes from the user's agent or ``~/.ssh``, and so do the servers that are trusted: fsspec
would accept any server's key, so that whoever answers could take what is published.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from ..errors import DestinationUnreachable, UnsafeError
from ._fsspec import FileSystemRepository

_TIMEOUT: Final = 20.0
_KNOWN: Final = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")


class SecureShellRepository(FileSystemRepository):
    """Opens the connection, again where it was cut, to a server whose key is known."""

    def _open(self, url: str) -> tuple[Any, str]:
        import fsspec
        import paramiko

        try:
            opened, root = fsspec.core.url_to_fs(
                url, host_key_policy=_known_only(), skip_instance_cache=True, timeout=_TIMEOUT,
                banner_timeout=_TIMEOUT, auth_timeout=_TIMEOUT,
            )
        except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as error:
            raise DestinationUnreachable(
                f"{self.reference}: access was refused ({error})",
                allowed="a key in ~/.ssh or the agent, and sftp://user@host for its user",
            ) from None
        opened.ftp.get_channel().settimeout(_TIMEOUT * 3)
        return opened, root

    def create(self, path: str, data: bytes) -> None:
        target = self._path(path)
        self._make_parent(target)
        try:
            file = self._fs.open(target, "wxb")
        except OSError:  # the protocol has one code for every failure
            if self.size(path) is None:
                raise
            raise FileExistsError(target) from None
        with file:
            file.write(data)

    def _alive(self) -> bool:
        transport = self._opened.client.get_transport()
        return bool(transport is not None and transport.is_active())


def _known_only() -> Any:
    import paramiko

    class KnownOnly(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
        """Accepts a server that the user's or the machine's ``known_hosts`` name with its key."""

        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            for name in map(os.path.expanduser, _KNOWN):
                if Path(name).is_file() and paramiko.HostKeys(name).check(hostname, key):
                    return
            raise UnsafeError(
                f"the server {hostname} shows a key that known_hosts does not name for it "
                f"({key.get_name()} {key.fingerprint})",
                allowed=" or ".join(_KNOWN),
                hint=f"ssh {hostname}, compare the fingerprint with its owner's, and accept it",
            )

    return KnownOnly()


DESTINATION = SecureShellRepository
