"""Certificates for the daemons, as Secrets hold them."""

from __future__ import annotations

import trustme

from samepage.daemon.roles import Role

#: Those of the daemons that a release always has.
ROLES = (Role.SCANNER, Role.MERGER, Role.INDEX)


WEBHOOK = "webhook"


def secrets() -> dict[str, dict[str, str]]:
    """The content of a Secret a role, and of the webhook's, all signed by one authority."""
    ca = trustme.CA()
    names = {str(role): role.dns_name for role in (*ROLES, Role.ARENAS, Role.CLIENT)}
    made = {}
    for user, name in (names | {WEBHOOK: "samepage-webhook.samepage.svc"}).items():
        issued = ca.issue_cert(name)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        files = {
            "tls.crt": chain,
            "tls.key": issued.private_key_pem.bytes(),
            "ca.crt": ca.cert_pem.bytes(),
        }
        made[user] = {name: content.decode() for name, content in files.items()}
    return made
