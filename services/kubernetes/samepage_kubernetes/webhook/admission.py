"""AdmissionReviews (admission.k8s.io/v1): what the API server asks, and what it is answered.

A pod is never refused for samepage's sake: at worst it is left as it is.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import structlog

from samepage_kubernetes.webhook.config import Config
from samepage_kubernetes.webhook.injection import Json, is_wanted, patch

_VERSION = "admission.k8s.io/v1"
_KIND = "AdmissionReview"

log = structlog.get_logger(__name__)


class BadReviewError(Exception):
    """It is no AdmissionReview of a version that this webhook knows; the text says why."""


class Admission:
    """Answers reviews.

    Attributes:
        outcomes: reviews so far: "injected", "complete" (lacked nothing), "unasked", "bad".
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.outcomes = Counter[str](injected=0, complete=0, unasked=0, bad=0)

    def answer(self, body: bytes) -> Json:
        """The answer to a request's body.

        Raises:
            BadReviewError: it makes no sense.
        """
        try:
            request = _request(body)
            pod = request.get("object")
            # A selector in the webhook's configuration should see to it that only pods come.
            kind = (request.get("kind") or {}).get("kind")
            operations = None
            if kind == "Pod" and isinstance(pod, dict):
                operations = self._operations(pod, request)
        except BadReviewError:
            self.outcomes["bad"] += 1
            raise
        except (AttributeError, TypeError) as error:
            self.outcomes["bad"] += 1
            raise BadReviewError("the review's pod is none") from error
        response: Json = {"uid": request["uid"], "allowed": True}
        if operations:
            packed = base64.b64encode(json.dumps(operations).encode()).decode()
            response |= {"patchType": "JSONPatch", "patch": packed}
        outcome = "unasked" if operations is None else "injected" if operations else "complete"
        self.outcomes[outcome] += 1
        return {"apiVersion": _VERSION, "kind": _KIND, "response": response}

    def _operations(self, pod: Json, request: Json) -> list[Json] | None:
        """The patch; None when nobody asked for one."""
        if not is_wanted(pod):
            return None
        operations = patch(pod, self._config)
        metadata = pod.get("metadata") or {}
        name = metadata.get("name") or metadata.get("generateName", "")
        log.info("pod", namespace=request.get("namespace"), name=name, operations=len(operations))
        return operations


def _request(body: bytes) -> Json:
    try:
        review: Any = json.loads(body)
    except ValueError as error:
        raise BadReviewError(f"the body is no JSON: {error}") from error
    if not isinstance(review, dict) or (review.get("apiVersion"), review.get("kind")) != (
        _VERSION,
        _KIND,
    ):
        raise BadReviewError(f"this webhook takes an {_KIND} of {_VERSION}")
    request = review.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise BadReviewError("the review has no request with a uid")
    return request
