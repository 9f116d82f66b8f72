"""Signatures over an artifact's directory, by OpenSSF model signing (a Sigstore bundle).

The signature covers every file but itself, the release record, which names it, and what modelport
leaves beside an artifact and never publishes (:func:`.store.traces`). A key pair is an
elliptic curve key (P-256, P-384 or P-521) in PEM. Keyless signing takes the identity of the
workload (in CI, the job's OpenID Connect token) and needs the public Sigstore service.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, DestinationUnreachable, SignatureRefused, UsageError
from ._rename import write_durable
from .digest import open_regular
from .release import RELEASE, SIGNATURE
from .storage import refusals
from .store import traces

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from .manifest import FileEntry

_MAX_BYTES = 16 << 20  # a signature names each file with its digest: kilobytes


@dataclass(frozen=True, slots=True)
class Identity:
    """Who must have signed without a key: the workload or person, and who vouched for them.

    Attributes:
        name: the certificate's identity, such as the URL of a CI workflow.
        issuer: the OpenID Connect issuer's URL.
    """

    name: str
    issuer: str


def sign(root: Path, private_key: Path | None) -> bytes:
    """Sign everything in an artifact's directory; what is returned is for ``signature.json``.

    Args:
        private_key: PEM file; its password, if any, is read from ``MODELPORT_KEY_PASSWORD``. None
            signs keyless, with the workload's own identity.

    Raises:
        BackendUnavailable: the package is not installed.
        UsageError: the key cannot be read.
        DestinationUnreachable: keyless, and no identity or no Sigstore service is at hand.
    """
    root = root.absolute()  # the library passes over what is to be ignored only then
    config = _module("signing").Config().set_hashing_config(_hashing(root))
    if private_key is not None:
        password = os.environ.get("MODELPORT_KEY_PASSWORD")
        try:
            config.use_elliptic_key_signer(private_key=private_key, password=password)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{private_key} cannot be read as a private key ({_reason(error)})",
                allowed="an elliptic curve key (P-256, P-384, P-521) in PEM",
                hint="openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
            ) from error
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, SIGNATURE)
        try:
            if private_key is None:  # fetches the service's keys
                config.use_sigstore_signer(use_ambient_credentials=True)
            config.sign(root, written)
        except Exception as error:
            if private_key is not None:
                raise
            raise DestinationUnreachable(
                f"keyless signing failed ({_reason(error)})",
                allowed="a workload identity (in CI: id-token: write) and the Sigstore service",
                hint="sign with --private-key instead",
            ) from error
        return written.read_bytes()


def write_beside(path: Path, data: bytes) -> None:
    """Write a file that lies beside an artifact's own, in one durable step.

    Raises:
        StorageError: the disk refused.
    """
    with refusals(path.parent):
        write_durable(path, data)


def verify_signature(root: Path, signer: Path | Identity) -> None:
    """Check that a directory is exactly what the owner of a key signed. Parses no file of it.

    Args:
        signer: public key in PEM, or the identity of a keyless signature.

    Raises:
        SignatureRefused: no signature; another key; a file changed, missing, added or renamed.
        PathEscape: a link or a special file is among the files.
        BackendUnavailable: the package is not installed.
        DestinationUnreachable: an identity is asked for and the Sigstore service is not at hand.
        UsageError: the public key cannot be read.
    """
    root = root.absolute()
    hashing = _hashing(root)  # links are refused before anything is opened
    try:
        descriptor = open_regular(root / SIGNATURE)
    except FileNotFoundError:
        raise SignatureRefused(
            f"{root} has no signature ({SIGNATURE})",
            allowed="an artifact published with --private-key or --keyless",
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_BYTES:
            raise SignatureRefused(f"{root / SIGNATURE} is larger than {_MAX_BYTES} bytes")
    config = _module("verifying").Config().set_hashing_config(hashing)
    _use(config, signer)
    try:
        config.verify(root, root / SIGNATURE)
    except Exception as error:  # the library raises ValueError, KeyError, its crypto's own, …
        raise SignatureRefused(
            f"the signature of {root} does not hold ({_reason(error)})",
            allowed="exactly the files that the owner of this key signed",
            hint="do not use it; fetch it again from where it was published",
        ) from error


def _use(config: Any, signer: Path | Identity) -> None:
    if isinstance(signer, Identity):
        try:
            config.use_sigstore_verifier(identity=signer.name, oidc_issuer=signer.issuer)
        except Exception as error:  # fetches the service's keys; its library's own, the network's
            raise DestinationUnreachable(
                f"the keys of the Sigstore service cannot be fetched ({_reason(error)})",
                hint="verify with --public-key what was signed with a key",
            ) from error
        return
    try:
        config.use_elliptic_key_verifier(public_key=signer)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{signer} cannot be read as a public key ({_reason(error)})",
            allowed="an elliptic curve public key in PEM",
            hint="openssl ec -in key.pem -pubout -out key.pub",
        ) from error


def _hashing(root: Path) -> Any:
    ignored = [root / name for name in (SIGNATURE, RELEASE, *traces(root))]
    hashing = _module("hashing").Config()
    # Git's own files count too: nothing that is published is exempt but what refers to the
    # signature.
    return hashing.set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _module(name: str) -> ModuleType:
    import importlib
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydantic and cryptography deprecations of its parts
            return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise BackendUnavailable(
            f"signatures need model-signing and pyOpenSSL, and {error.name or error} is not here",
            hint='pip install "modelport[publish]"',
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def covers(signature: bytes, files: Mapping[str, FileEntry]) -> bool:
    """Whether a signature is on exactly these files; says nothing on who signed.

    Args:
        files: every file but the signature and the release record.
    """
    import base64

    try:
        bundle = json.loads(signature)
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        signed = {r["name"]: r["digest"] for r in payload["predicate"]["resources"]}
    except (ValueError, KeyError, TypeError):
        return False
    return signed == {name: entry.sha256 for name, entry in files.items()}
