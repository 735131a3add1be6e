"""An authority that signs for roles, and certificates in files."""

from __future__ import annotations

from pathlib import Path

import trustme

from samepage.daemon.roles import Role
from samepage.daemon.tls import TlsFiles


class Authority:
    """Signs certificates; each test may have several that know nothing of each other."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def issue(self, directory: Path, *names: str, also: Authority | None = None) -> TlsFiles:
        """Write a certificate for such DNS names, its key, and the signers that it trusts.

        Files that are there are replaced, one after the other.
        """
        directory.mkdir(parents=True, exist_ok=True)
        files = TlsFiles(*(directory / name for name in ("tls.crt", "tls.key", "ca.crt")))
        issued = self._ca.issue_cert(*names)
        files.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        signers = [self, also] if also is not None else [self]
        files.ca.write_bytes(b"".join(one._ca.cert_pem.bytes() for one in signers))
        return files

    def role(self, directory: Path, role: Role, also: Authority | None = None) -> TlsFiles:
        """`issue`, for a role, in a folder of its name."""
        return self.issue(directory / role, role.dns_name, also=also)


def settings(files: TlsFiles) -> dict[str, object]:
    """The files as a daemon's settings."""
    return {
        "tls_cert_file": files.cert,
        "tls_key_file": files.key,
        "tls_ca_file": files.ca,
    }
