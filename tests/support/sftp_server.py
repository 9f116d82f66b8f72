"""``python sftp_server.py PORT DIRECTORY``: an SFTP server on 127.0.0.1 for one user's key.

Below the directory, ``files`` is what the server shows as its root; ``client`` and ``host`` are the
user's and the server's keys, made anew.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncssh


async def serve(port: int, directory: Path) -> None:
    (directory / "files").mkdir()
    keys = {}
    for name in ("host", "client"):
        keys[name] = asyncssh.generate_private_key("ssh-ed25519")
        keys[name].write_private_key(directory / name)
        keys[name].write_public_key(directory / f"{name}.pub")

    def chrooted(channel: asyncssh.SSHServerChannel) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(channel, chroot=str(directory / "files").encode())

    server = await asyncssh.listen(
        "127.0.0.1", port, server_host_keys=[keys["host"]], sftp_factory=chrooted,
        authorized_client_keys=str(directory / "client.pub"),
    )
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
