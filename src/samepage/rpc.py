"""Calls to the daemons of a host over gRPC, with samepage's errors.

The API sockets in a host's socket directory have mode 0600: they are for operators, that is root
and the user that runs the daemons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from samepage import errors

MERGER_SOCKET = "merger-api.sock"
SCANNER_SOCKET = "scanner-api.sock"
ARENAS_SOCKET = "arenas-api.sock"
TIMEOUT_SECONDS = 10.0

STATUS_ERRORS = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.UNAVAILABLE: errors.ServiceUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.ServiceUnavailableError,
    grpc.StatusCode.CANCELLED: errors.ServiceUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OutOfMemoryError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolVersionError,
}


def socket_address(directory: Path, socket: str) -> str:
    """Return the gRPC target of a daemon's API socket.

    Raises:
        NotRunningError: there is no such socket, or it is not for this user.
    """
    path = directory / socket
    try:
        path.stat()
    except FileNotFoundError:
        raise errors.NotRunningError(
            f"no daemon serves {path}: start it ('samepage up' starts a whole cluster), or name "
            "another directory (SAMEPAGE_DIR)"
        ) from None
    except PermissionError:
        raise _not_permitted(path) from None
    if not os.access(path, os.R_OK | os.W_OK):
        raise _not_permitted(path)
    return f"unix:{path.absolute()}"


def _not_permitted(path: Path) -> errors.SamepageError:
    return errors.NotRunningError(
        f"{path} is for operators only: ask as root or as the user that runs the daemons"
    )


@contextmanager
def channel(address: str, role: str = "") -> Iterator[grpc.Channel]:
    """Open a channel, and close it. A call's errors inside become samepage's.

    A daemon beyond a unix socket must have the `role` (docs/tls.md) when SAMEPAGE_TLS_CERT_FILE,
    SAMEPAGE_TLS_KEY_FILE and SAMEPAGE_TLS_CA_FILE say the caller's certificate.

    Raises:
        SamepageError: of the kind in STATUS_ERRORS, with the daemon's own words.
    """
    try:
        with _open(address, role) as opened:
            yield opened
    except grpc.RpcError as error:
        raise _translate(error, address) from error


# Local sockets and loopback addresses: a proxy of the environment has no business here.
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 * 2**20)]


def _open(address: str, role: str) -> grpc.Channel:
    names = [f"SAMEPAGE_TLS_{file}_FILE" for file in ("CA", "KEY", "CERT")]
    files = [os.environ.get(name, "") for name in names]
    if address.startswith("unix:") or not any(files):
        return grpc.insecure_channel(address, _OPTIONS)
    try:
        credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in files))
    except OSError as error:
        raise errors.InvalidArgumentError(
            f"cannot read {error.filename} ({error.strerror}): {', '.join(names)} go together"
        ) from error
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", f"{role}.samepage")]
    return grpc.secure_channel(address, credentials, options)


def _translate(error: grpc.RpcError, address: str) -> errors.SamepageError:
    code: Callable[[], grpc.StatusCode] | None = getattr(error, "code", None)
    details: Callable[[], str | None] | None = getattr(error, "details", None)
    status = code() if code is not None else grpc.StatusCode.UNKNOWN
    text = (details() if details is not None else None) or str(error)
    if text == "Deadline Exceeded":  # grpc's own; a daemon says what took too long
        text = "no answer in time"
    kind = STATUS_ERRORS.get(status, errors.SamepageError)
    return kind(f"{address}: {text}")
