"""The policy file: who may use which domains.

    [[allow]]
    domains = ["shop"]              # the first is the own one; "*" is any
    namespaces = ["shop", "shop-*"] # all conditions that are there must hold

The file may change at any time. One that makes no sense changes nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import structlog

from samepage.daemon.config import ConfigError
from samepage.daemon.files import look
from samepage.daemon.identity.base import DEFAULT_DOMAIN, DeniedError, Subject
from samepage.daemon.secrets import check_domain
from samepage.errors import InvalidArgumentError

ANY = "*"

_ID_MAX = 2**32 - 1

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Rule:
    """One [[allow]]. A condition that is empty holds for everybody."""

    domains: tuple[str, ...]
    uids: tuple[range, ...] = ()
    gids: tuple[range, ...] = ()
    namespaces: tuple[str, ...] = ()
    service_accounts: tuple[str, ...] = ()

    def fits(self, subject: Subject) -> bool:
        """Whether all its conditions hold."""
        account = f"{subject.namespace}/{subject.service_account}"
        return (
            (not self.uids or _within({subject.uid}, self.uids))
            and (not self.gids or _within(subject.gids, self.gids))
            and (not self.namespaces or _matches(subject.namespace, self.namespaces))
            and (not self.service_accounts or _matches(account, self.service_accounts))
        )


class Policy:
    """The file as it is now.

    Args:
        path: None for no rules.
        tokens: whether processes show tokens: then a namespace that no rule fits has a domain of
            its own, and rules may speak of namespaces.

    Raises:
        ConfigError: the file makes no sense.
    """

    def __init__(self, path: Path | None, tokens: bool) -> None:
        self._path = path
        self._tokens = tokens
        self._seen = look(path) if path is not None else ()
        self._rules = _read(path, tokens) if path is not None else ()

    def choose(self, subject: Subject, wanted: str) -> str:
        """The domain `wanted`, or with an empty one the subject's own.

        Raises:
            DeniedError: it may not use that, or none at all.
        """
        allowed = self.allowed(subject)
        if not allowed:
            raise DeniedError(
                errno.EACCES,
                f"{subject} may use no domain of this host: its operator decides that, in "
                "identity_policy_file",
            )
        if not wanted:
            return DEFAULT_DOMAIN if allowed[0] == ANY else allowed[0]
        if wanted in allowed or ANY in allowed:
            return wanted
        raise DeniedError(
            errno.EACCES,
            f"{subject} may not use the domain {wanted!r}, only {', '.join(allowed)}: leave the "
            "domain out to use your own, or ask the host's operator",
        )

    def allowed(self, subject: Subject) -> list[str]:
        """All that it may use, its own first."""
        self._refresh()
        fitting = [domain for rule in self._rules if rule.fits(subject) for domain in rule.domains]
        if not fitting and self._tokens:
            # A domain of the policy is for those alone whom the policy names.
            named = {domain for rule in self._rules for domain in rule.domains}
            fitting = [] if subject.namespace in named else [subject.namespace]
        return list(dict.fromkeys(fitting))

    def _refresh(self) -> None:
        if self._path is None or (seen := look(self._path)) == self._seen:
            return
        self._seen = seen
        try:
            self._rules = _read(self._path, self._tokens)
        except ConfigError as error:
            log.warning("policy not changed", why=str(error))
        else:
            log.info("policy changed", file=str(self._path), rules=len(self._rules))


def _within(ids: set[int] | frozenset[int], ranges: tuple[range, ...]) -> bool:
    return any(one in some for one in ids for some in ranges)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read(path: Path, tokens: bool) -> tuple[Rule, ...]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the policy {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy {path} is not valid TOML: {error}") from error
    tables = content.pop("allow", [])
    if content or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"the policy {path} must hold tables [[allow]] and nothing else")
    return tuple(
        _rule(table, tokens, f"the policy {path}: [[allow]] number {number}")
        for number, table in enumerate(tables, 1)
    )


def _rule(table: dict[str, Any], tokens: bool, where: str) -> Rule:
    known = [field.name for field in fields(Rule)]
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: there is no {key}; there are {', '.join(known)}")
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{where}: {key} must be a list that is not empty")
    if "domains" not in table or len(table) == 1:
        raise ConfigError(f"{where}: say domains, and for whom: {', '.join(known[1:])}")
    if not tokens and not {"namespaces", "service_accounts"}.isdisjoint(table):
        raise ConfigError(f'{where}: namespaces and service_accounts are known by identity "token"')
    return Rule(
        domains=tuple(_domain(value, where) for value in table["domains"]),
        uids=tuple(_ids(value, where) for value in table.get("uids", ())),
        gids=tuple(_ids(value, where) for value in table.get("gids", ())),
        namespaces=tuple(_text(value, where) for value in table.get("namespaces", ())),
        service_accounts=tuple(
            _account(value, where) for value in table.get("service_accounts", ())
        ),
    )


def _domain(value: object, where: str) -> str:
    text = _text(value, where)
    try:
        return text if text == ANY else check_domain(text)
    except InvalidArgumentError as error:
        raise ConfigError(f"{where}: {error}") from error


def _ids(value: object, where: str) -> range:
    """A number, or "first-last"."""
    first, dash, last = str(value).partition("-")
    parts = (first, last if dash else first)
    if isinstance(value, int | str) and all(part.isascii() and part.isdigit() for part in parts):
        low, high = map(int, parts)
        if low <= high <= _ID_MAX:
            return range(low, high + 1)
    raise ConfigError(f'{where}: {value!r} is neither a number nor a range, as in "1000-1999"')


def _account(value: object, where: str) -> str:
    text = _text(value, where)
    if text.count("/") != 1:
        raise ConfigError(f"{where}: the service account {text!r} must be namespace/name")
    return text


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {value!r} is not a name")
    return value
