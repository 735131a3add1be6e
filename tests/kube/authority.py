"""Who signs: the certificates of a cluster's parts, and how they reach its API server with them."""

from __future__ import annotations

from pathlib import Path

import trustme
import yaml


class Authority:
    """Writes certificates, keys and kubeconfigs into a directory.

    Args:
        server: the API server's address, https://host:port.
    """

    def __init__(self, directory: Path, server: str) -> None:
        self._directory = directory
        self._server = server
        self._ca = trustme.CA()
        self._write("ca.crt", self._ca.cert_pem.bytes())

    @property
    def certificate(self) -> Path:
        """Its own."""
        return self._directory / "ca.crt"

    def issue(self, file: str, *hosts: str, name: str = "", group: str = "") -> tuple[Path, Path]:
        """Return a new certificate and its key."""
        issued = self._ca.issue_cert(
            *hosts, common_name=name or None, organization_name=group or None
        )
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return (
            self._write(f"{file}.crt", chain),
            self._write(f"{file}.key", issued.private_key_pem.bytes()),
        )

    def admit(self, name: str, group: str = "") -> Path:
        """Return a kubeconfig for a user of a group."""
        certificate, key = self.issue(
            name, f"{name.replace(':', '-')}.test", name=name, group=group
        )
        cluster = {"server": self._server, "certificate-authority": str(self.certificate)}
        user = {"client-certificate": str(certificate), "client-key": str(key)}
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        return self._write(f"{name}.kubeconfig", yaml.safe_dump(access).encode())

    def _write(self, name: str, content: bytes) -> Path:
        file = self._directory / name
        file.touch(mode=0o600)
        file.write_bytes(content)
        return file
