"""In a pod: says what becomes of each token that it shows, as JSON."""

import base64
import json
import os
import pathlib
import sys

import samepage

TOKENS = pathlib.Path("/tokens")


def forged(token: str) -> str:
    """The pod's own, changed to one of the job's namespace; nobody has signed that."""
    head, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["sub"] = "system:serviceaccount:default:default"
    claims["kubernetes.io"]["namespace"] = "default"
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return ".".join((head, changed, signature))


def outcome(file: pathlib.Path, domain: str | None = None) -> str:
    """The domain that a token leads into, or why it does not."""
    os.environ["SAMEPAGE_TOKEN_FILE"] = str(file)
    while True:
        try:
            with samepage.connect() as node, node.create_arena("impostor", 4096, domain) as arena:
                return arena.domain
        except samepage.PermissionDeniedError as error:
            return str(error)
        except samepage.ServiceUnavailableError as error:
            print("tried again:", error, file=sys.stderr)


own = TOKENS / "samepage"
fake = pathlib.Path("/tmp/forged")
fake.write_text(forged(own.read_text()))
outcomes = {
    "own": outcome(own),
    "own, for the job's domain": outcome(own, "default"),
    "forged": outcome(fake),
    "for the API server": outcome(TOKENS / "api"),
    "none": outcome(pathlib.Path("/none")),
}
print(json.dumps(outcomes))
