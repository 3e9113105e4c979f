"""The error tree. The same classes are raised on both sides of the wire.

    OnTheFlyError                       status  code
    ├── InvalidRequest                  422     invalid_request       a field is wrong; `param` names it
    │   ├── UnsupportedField            422     unsupported_field     documented elsewhere, not served here
    │   ├── UnknownClass                422     unknown_class
    │   ├── InvalidImage                422     invalid_image         not an image, or too large
    │   └── UnknownSource               422     unknown_source        feedback names a sample the service lacks
    ├── Unauthorized                    401     unauthorized
    ├── NotFound                        404     not_found
    │   ├── UnknownWeights              404     unknown_weights
    │   ├── UnknownJob                  404     unknown_job
    │   └── UnknownSample               404     unknown_sample
    ├── Conflict                        409     conflict
    │   └── IdempotencyConflict         409     idempotency_conflict  same key, another body
    ├── BodyTooLarge                    413     body_too_large
    ├── Retryable                       503     retryable             `retry_after` seconds
    │   ├── QueueFull                   429     queue_full
    │   ├── NotReady                    503     not_ready
    │   ├── BrokerUnavailable           503     broker_unavailable
    │   └── ServiceUnreachable          503     service_unreachable   raised by the client only
    ├── Cancelled                       409     cancelled             a job or request was cancelled
    ├── GenerationFailed                500     generation_failed     the backend raised; the cause is logged
    ├── ConfigError                     400     config_error          a settings file or flag; exit code 2
    ├── DatasetError                    400     dataset_error
    │   └── BadFile                     400     bad_file              names the file
    ├── WeightsCorrupt                  500     weights_corrupt       digest or files do not match the manifest
    ├── BlobError                       500     blob_error
    │   ├── BlobCorrupt                 500     blob_corrupt          sha256 or size differs
    │   └── BlobMissing                 500     blob_missing          expired or never written
    ├── CheckpointCorrupt               500     checkpoint_corrupt
    └── TrainingDiverged                500     training_diverged     the loss is NaN or infinite

User mistakes raise one of these with a message that says what to do; invariants are asserts.
On the wire each is an RFC 9457 problem document whose `error` member has OpenAI's shape.
"""

from __future__ import annotations

from typing import Any, ClassVar


class OnTheFlyError(Exception):
    """Root of the tree. `message` says what is wrong and what to do; `param` names the field, if one is to blame."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def to_problem(self) -> dict[str, Any]:
        """RFC 9457 problem document with OpenAI's `error` member."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "type": f"urn:onthefly:error:{self.code}",
            "title": self.code.replace("_", " "),
            "status": self.status,
            "detail": self.message,
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


class InvalidRequest(OnTheFlyError):
    status, code = 422, "invalid_request"


class UnsupportedField(InvalidRequest):
    code = "unsupported_field"


class UnknownClass(InvalidRequest):
    code = "unknown_class"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class UnknownSource(InvalidRequest):
    code = "unknown_source"


class Unauthorized(OnTheFlyError):
    status, code = 401, "unauthorized"


class NotFound(OnTheFlyError):
    status, code = 404, "not_found"


class UnknownWeights(NotFound):
    code = "unknown_weights"


class UnknownJob(NotFound):
    code = "unknown_job"


class UnknownSample(NotFound):
    code = "unknown_sample"


class Conflict(OnTheFlyError):
    status, code = 409, "conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class BodyTooLarge(OnTheFlyError):
    status, code = 413, "body_too_large"


class Retryable(OnTheFlyError):
    """Nothing is wrong with the request; try it again after `retry_after` seconds."""

    status, code = 503, "retryable"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = 1.0):
        super().__init__(message, param=param, retry_after=retry_after)


class QueueFull(Retryable):
    status, code = 429, "queue_full"


class NotReady(Retryable):
    code = "not_ready"


class BrokerUnavailable(Retryable):
    code = "broker_unavailable"


class ServiceUnreachable(Retryable):
    code = "service_unreachable"


class Cancelled(OnTheFlyError):
    status, code = 409, "cancelled"


class GenerationFailed(OnTheFlyError):
    code = "generation_failed"


class ConfigError(OnTheFlyError):
    status, code = 400, "config_error"


class DatasetError(OnTheFlyError):
    status, code = 400, "dataset_error"


class BadFile(DatasetError):
    code = "bad_file"


class WeightsCorrupt(OnTheFlyError):
    code = "weights_corrupt"


class BlobError(OnTheFlyError):
    code = "blob_error"


class BlobCorrupt(BlobError):
    code = "blob_corrupt"


class BlobMissing(BlobError):
    code = "blob_missing"


class CheckpointCorrupt(OnTheFlyError):
    code = "checkpoint_corrupt"


class TrainingDiverged(OnTheFlyError):
    code = "training_diverged"


def _tree(root: type[OnTheFlyError]) -> dict[str, type[OnTheFlyError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_problem(problem: dict[str, Any], *, retry_after: float | None = None) -> OnTheFlyError:
    """The error that a problem document stands for; an unknown code gives the root class.

    Args:
        problem: a document made by `OnTheFlyError.to_problem`.
        retry_after: seconds, from the `Retry-After` header.
    """
    inner = problem.get("error") or {}
    cls = _tree(OnTheFlyError).get(inner.get("code"), OnTheFlyError)
    message = inner.get("message") or problem.get("detail") or "unknown error"
    if retry_after is None:
        return cls(message, param=inner.get("param"))
    return cls(message, param=inner.get("param"), retry_after=retry_after)
