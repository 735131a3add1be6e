"""`samepage policy`: what the daemons of a host may do, shown and changed while they run.

Which policies there are is not said here: they are the fields of the policy message of each
daemon's GetPolicy and SetPolicy (proto/samepage/v1/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from samepage import rpc
from samepage.cli import places
from samepage.cli.output import DirectoryOption, JsonOption, print_json, print_table
from samepage.errors import InvalidArgumentError
from samepage.sizes import parse_size
from samepage.v1 import merger_pb2, scanner_pb2

Value = float | int | bool | str
Call = Callable[..., Any]


@dataclass(frozen=True)
class Daemon:
    """A daemon of a host, and the fields of its policy by name."""

    name: str
    socket: str
    service: ServiceDescriptor

    @property
    def fields(self) -> Mapping[str, FieldDescriptor]:
        """The fields of its policy message."""
        answer = self.service.methods_by_name["GetPolicy"].output_type
        message = answer.fields_by_name["policy"].message_type
        return message.fields_by_name if message else {}


DAEMONS = tuple(
    daemon
    for daemon in (
        Daemon("scanner", rpc.SCANNER_SOCKET, scanner_pb2.DESCRIPTOR.services_by_name["Scanner"]),
        Daemon("merger", rpc.MERGER_SOCKET, merger_pb2.DESCRIPTOR.services_by_name["Merger"]),
    )
    if "GetPolicy" in daemon.service.methods_by_name
)


def policy(
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="What to change. Default: only show."),
    ] = None,
    host: Annotated[str, typer.Option(help="Only the host of this name.")] = "",
    directory: DirectoryOption = None,
    json: JsonOption = False,
) -> None:
    """Show or change what the daemons may do: intervals, budgets and limits.

    A change is in force at once, until the daemon ends. What is to stay belongs into its
    configuration.
    """
    wanted = _parse(changes or [])
    hosts = places.named(places.find(directory).hosts, host)
    found = [
        (chosen, daemon.name, _exchange(chosen, daemon, wanted))
        for chosen in hosts
        for daemon in DAEMONS
    ]
    if json:
        print_json(
            [{"host": chosen.name, "daemon": name, **values} for chosen, name, values in found]
        )
        return
    print_table(
        ["host", "daemon", "policy", ">value"],
        [
            (chosen.name or str(chosen.directory), daemon, name, _text(value))
            for chosen, daemon, values in found
            for name, value in values.items()
        ],
    )


def _parse(changes: Sequence[str]) -> dict[str, Value]:
    """Return the values by name.

    Raises:
        InvalidArgumentError: there is no such policy, or no such value of it.
    """
    fields = {name: field for daemon in DAEMONS for name, field in daemon.fields.items()}
    wanted: dict[str, Value] = {}
    for change in changes:
        name, given, text = change.partition("=")
        if not given:
            raise InvalidArgumentError(f"{change!r} changes nothing: write NAME=VALUE")
        if name not in fields:
            raise InvalidArgumentError(
                f"there is no policy {name!r}; there are {', '.join(fields)}"
            )
        if name in wanted:
            raise InvalidArgumentError(f"{name} is given twice")
        wanted[name] = _parse_value(fields[name], text)
    return wanted


def _parse_value(field: FieldDescriptor, text: str) -> Value:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return text
    if kind == FieldDescriptor.CPPTYPE_BOOL and text in ("true", "false"):
        return text == "true"
    try:
        if kind == FieldDescriptor.CPPTYPE_DOUBLE and math.isfinite(float(text)):
            return float(text)
        if kind == FieldDescriptor.CPPTYPE_UINT64 and field.name.endswith("_bytes"):
            value = parse_size(text) if text != "0" else 0
        else:
            value = int(text)
        if 0 <= value < 2 ** (64 if kind == FieldDescriptor.CPPTYPE_UINT64 else 32):
            return value
    except ValueError:
        pass
    raise InvalidArgumentError(f"{field.name}={text}: {text!r} is not {_describe(field)}")


def _describe(field: FieldDescriptor) -> str:
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return "a number"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if field.name.endswith("_bytes"):
        return 'a number of bytes, nor a size such as "512MiB"'
    return "a whole number from 0 up"


def _exchange(host: places.Host, daemon: Daemon, wanted: Mapping[str, Value]) -> dict[str, Value]:
    """Change what is wanted of this daemon; return all of its policy.

    Raises:
        InvalidArgumentError: a value is out of its range.
        NotRunningError, ServiceUnavailableError: it does not answer.
    """
    mine = {name: value for name, value in wanted.items() if name in daemon.fields}
    method = daemon.service.methods_by_name["SetPolicy" if mine else "GetPolicy"]
    request: Any = GetMessageClass(method.input_type)()
    for name, value in mine.items():
        setattr(request.policy, name, value)
    with rpc.channel(rpc.socket_address(host.directory, daemon.socket)) as channel:
        answer = _call(channel, method)(request, timeout=rpc.TIMEOUT_SECONDS)
    return {name: getattr(answer.policy, name) for name in daemon.fields}


def _call(channel: grpc.Channel, method: MethodDescriptor) -> Call:
    call: Call = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    return call


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
