"""Mutual TLS between the daemons: certificates from files, which may change while they run.

Theory. A daemon has one certificate, for calling and for being called, and one file of those who
sign the others'. The files are looked at (stat) before each handshake of a server and each time
that a client asks for a channel; when they have changed, they are read and checked as a whole, and
a set that does not fit together (one that is only half written, say) changes nothing: the old one
goes on, and the log says why. A connection keeps the certificates that it began with, so clients
make a new channel when theirs have changed.

Roles are in samepage.daemon.roles. Unix sockets have no TLS, since their mode says who may
connect.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from samepage.daemon.addresses import UNIX, check_listen, is_local
from samepage.daemon.config import ConfigError, require, setting
from samepage.daemon.files import Look, look
from samepage.daemon.roles import Role

_GRACE_SECONDS = 30.0

log = structlog.get_logger(__name__)

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: the certificate with those between it and its signer, its key, and the
    certificates of those who sign the other daemons'."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class NetworkSettings:
    """The settings of every daemon that serves others over a network."""

    tls_cert_file: Path | None = setting(
        None,
        "File with this daemon's certificate (PEM), whose DNS name says its role, such as "
        "merger.samepage; docs/tls.md has the roles. With the next two it switches on mutual TLS, "
        "for all but unix sockets. The files may change at any time. Empty: no TLS.",
    )
    tls_key_file: Path | None = setting(None, "File with the key of tls_cert_file (PEM).")
    tls_ca_file: Path | None = setting(
        None,
        "File with the certificates of those who sign the daemons' (PEM). Whoever they sign for a "
        "role has it, so let them sign for this cluster alone.",
    )
    insecure: bool = setting(
        False,
        "Whether to serve and call beyond this machine without TLS: for a network that only this "
        "cluster can reach. Without it, and without TLS, only loopback addresses and unix sockets "
        "are taken.",
    )
    health_listen: str = setting(
        "",
        "Address of the health service alone, host:port, without TLS: for probes. Port 0 takes "
        "any free one. Empty: none; it is always on the daemon's own addresses, for the others.",
    )
    reflection: bool = setting(False, "Whether to offer gRPC server reflection.")

    def check_network(self, listen: Sequence[str], targets: Sequence[str] = ()) -> None:
        """Check these settings, and where the daemon serves and what it calls (empty: nothing).

        Raises:
            ConfigError: one makes no sense, or there is no TLS where it should be.
        """
        for address in listen:
            check_listen(address)
        if self.health_listen:
            check_listen(self.health_listen)
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        require(
            all(files) or not any(files),
            "tls_cert_file, tls_key_file and tls_ca_file go together: set all three, or none",
        )
        if any(files):
            require(not self.insecure, "insecure is set, and so is TLS: leave one of them out")
        elif not self.insecure:
            for address in (*listen, *targets):
                require(
                    not address or is_local(address),
                    f"{address} is beyond this machine, and there is no TLS: set tls_cert_file, "
                    "tls_key_file and tls_ca_file (docs/tls.md), or set insecure = true on a "
                    "network that only this cluster can reach",
                )

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files, or None without TLS."""
        if self.tls_cert_file and self.tls_key_file and self.tls_ca_file:
            return TlsFiles(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        return None


class Tls:
    """A daemon's certificate, as its files are now. May be used from any thread.

    Attributes:
        generation: grows with every set of files that was taken.

    Raises:
        ConfigError: the files cannot be read, or do not fit together.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._look()
        self._pem = _read(files)
        self.generation = 1

    @classmethod
    def of(cls, files: TlsFiles | None) -> Tls | None:
        """The certificate in the files, if there are any.

        Raises:
            ConfigError: they cannot be read, or do not fit together.
        """
        return cls(files) if files is not None else None

    def refresh(self) -> None:
        """Take the files anew when they have changed."""
        with self._lock:
            seen = self._look()
            if seen == self._seen:
                return
            self._seen = seen
            try:
                self._pem = _read(self._files)
            except ConfigError as error:
                log.warning("certificates not changed", why=str(error))
                return
            self.generation += 1
            log.info("certificates changed", file=str(self._files.cert))

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server: it follows the files, and takes no client without a certificate."""

        def renewed() -> grpc.ServerCertificateConfiguration:
            self.refresh()
            return self._server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            renewed(), renewed, require_client_authentication=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel: the files as they are now."""
        self.refresh()
        cert, key, ca = self._pem
        return grpc.ssl_channel_credentials(ca, key, cert)

    def server_context(self) -> ssl.SSLContext:
        """For one handshake of a server without gRPC; it takes no client without a certificate."""
        self.refresh()
        context = _context(ssl.PROTOCOL_TLS_SERVER, *self._pem)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """For one handshake of a client without gRPC; it needs the name of the server's role."""
        self.refresh()
        return _context(ssl.PROTOCOL_TLS_CLIENT, *self._pem)

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, ca = self._pem
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _look(self) -> Look:
        return look(self._files.cert, self._files.key, self._files.ca)


def open_channel(
    target: str, role: Role, tls: Tls | None, options: Options = ()
) -> grpc.aio.Channel:
    """Make a channel to a daemon that must have `role`; with TLS, unless it is a unix socket."""
    if tls is None or target.startswith(UNIX):
        return grpc.aio.insecure_channel(target, options=list(options))
    # The name stands for the role, and the address is only where it is found.
    named = [*options, ("grpc.ssl_target_name_override", role.dns_name)]
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=named)


class Channels:
    """Channels to daemons of one role, kept; each is made anew when the certificates change.

    Args:
        role: what the daemons must be.
        tls: None: without.
        options: gRPC's, for each channel.
    """

    def __init__(self, role: Role, tls: Tls | None, options: Options = ()) -> None:
        self._role = role
        self._tls = tls
        self._options = options
        self._generation = 0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, target: str) -> grpc.aio.Channel:
        """Return the channel to a target. Ask anew for each call; calls in flight go on."""
        if self._tls is not None:
            self._tls.refresh()
            if self._tls.generation != self._generation:
                self._generation = self._tls.generation
                for known in list(self._channels):
                    self.drop(known)
        channel = self._channels.get(target)
        if channel is None:
            channel = open_channel(target, self._role, self._tls, self._options)
            self._channels[target] = channel
        return channel

    def drop(self, target: str) -> None:
        """Let go of a channel; calls in flight have half a minute."""
        channel = self._channels.pop(target, None)
        if channel is not None:
            closing = asyncio.create_task(channel.close(_GRACE_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End all of them now."""
        channels = [*self._channels.values()]
        self._channels.clear()
        for closing in list(self._closing):
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for channel in channels:
            await channel.close()


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Certificate, key and signers, which fit together.

    Raises:
        ConfigError: they do not, or cannot be read.
    """
    cert, key, ca = (_read_file(path) for path in (files.cert, files.key, files.ca))
    try:
        _context(ssl.PROTOCOL_TLS_SERVER, cert, key)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{files.cert} and {files.key} are not a certificate and its key, without a "
            f"password, in PEM: {_why(error)}"
        ) from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{files.ca} holds no certificates in PEM: {_why(error)}") from error
    return cert, key, ca


def _context(side: int, cert: bytes, key: bytes, ca: bytes = b"") -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    # The ssl module takes a certificate from a path only. A memfd is one, and holds what was read.
    memory = os.memfd_create("samepage-tls", os.MFD_CLOEXEC)
    try:
        os.write(memory, key.rstrip() + b"\n" + cert)
        context.load_cert_chain(f"/proc/self/fd/{memory}", password=lambda: b"")
    finally:
        os.close(memory)
    if ca:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    return context


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error)
