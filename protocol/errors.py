"""The error tree. The same classes are raised on both sides of the wire.

    OnTheFlyError                       status  code
    ├── InvalidRequest                  422     invalid_request       a field is wrong; `param` names it
    │   ├── UnsupportedField            422     unsupported_field     documented elsewhere, not served here
    │   ├── UnknownClass                422     unknown_class
    │   ├── InvalidImage                422     invalid_image         not an image, or too large
    │   ├── InvalidClip                 422     invalid_clip          not a clip, damaged, too short or too large
    │   ├── NoFace                      422     no_face               no frame shows a face that can be used
    │   └── UnknownSource               422     unknown_source        feedback names a sample the service lacks
    ├── Unauthorized                    401     unauthorized          no key, or one that nobody has
    ├── Forbidden                       403     forbidden             this key may not do that
    ├── NotFound                        404     not_found
    │   ├── UnknownWeights              404     unknown_weights
    │   ├── UnknownJob                  404     unknown_job
    │   ├── UnknownSample               404     unknown_sample
    │   ├── UnknownRun                  404     unknown_run
    │   └── UnknownDeadLetter           404     unknown_dead_letter
    ├── Conflict                        409     conflict
    │   └── IdempotencyConflict         409     idempotency_conflict  same key, another body
    ├── BodyTooSlow                     408     body_too_slow         it did not arrive in time
    ├── BodyTooLarge                    413     body_too_large
    ├── Retryable                       503     retryable             `retry_after` seconds
    │   ├── QueueFull                   429     queue_full
    │   │   └── BrokerFull              429     broker_full           it is out of memory
    │   ├── RateLimited                 429     rate_limited          this key asked too often
    │   ├── Overloaded                  503     overloaded            too many requests at a time
    │   ├── NotReady                    503     not_ready
    │   ├── NotEverywhere               503     not_everywhere        weights are active, but not on all replicas yet
    │   ├── BrokerUnavailable           503     broker_unavailable
    │   ├── LanguageUnavailable         503     language_unavailable  a language model gives no usable answer
    │   └── ServiceUnreachable          503     service_unreachable   raised by the client only
    │       └── NotTheService           503     not_the_service       something else answers there
    ├── Cancelled                       409     cancelled             a job or request was cancelled
    ├── GenerationFailed                500     generation_failed     the backend raised; the cause is logged
    ├── ConfigError                     400     config_error          a settings file or flag; exit code 2
    ├── DatasetError                    400     dataset_error
    │   └── BadFile                     400     bad_file              names the file
    ├── WeightsCorrupt                  500     weights_corrupt       digest or files do not match the manifest
    ├── BlobError                       500     blob_error
    │   ├── BlobCorrupt                 500     blob_corrupt          sha256 or size differs
    │   └── BlobMissing                 410     blob_missing          expired or never written
    ├── WrongWeights                    500     wrong_weights         samples were not made with the weights promised
    ├── WrongIdentity                   500     wrong_identity        samples are not of the class they were asked for
    ├── CheckpointCorrupt               500     checkpoint_corrupt
    ├── DiskFull                        507     disk_full             nothing was written
    ├── TrainingDiverged                500     training_diverged     the loss is NaN or infinite
    └── PeerFailed                      500     peer_failed           another process of the run says why

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


class InvalidClip(InvalidRequest):
    code = "invalid_clip"


class NoFace(InvalidRequest):
    code = "no_face"


class UnknownSource(InvalidRequest):
    code = "unknown_source"


class Unauthorized(OnTheFlyError):
    status, code = 401, "unauthorized"


class Forbidden(OnTheFlyError):
    status, code = 403, "forbidden"


class NotFound(OnTheFlyError):
    status, code = 404, "not_found"


class UnknownWeights(NotFound):
    code = "unknown_weights"


class UnknownJob(NotFound):
    code = "unknown_job"


class UnknownSample(NotFound):
    code = "unknown_sample"


class UnknownRun(NotFound):
    code = "unknown_run"


class UnknownDeadLetter(NotFound):
    code = "unknown_dead_letter"


class Conflict(OnTheFlyError):
    status, code = 409, "conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class BodyTooSlow(OnTheFlyError):
    status, code = 408, "body_too_slow"


class BodyTooLarge(OnTheFlyError):
    status, code = 413, "body_too_large"


class Retryable(OnTheFlyError):
    """Nothing is wrong with the request; try it again after `retry_after` seconds."""

    status, code = 503, "retryable"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = 1.0):
        super().__init__(message, param=param, retry_after=retry_after)


class QueueFull(Retryable):
    status, code = 429, "queue_full"


class BrokerFull(QueueFull):
    code = "broker_full"


class RateLimited(Retryable):
    status, code = 429, "rate_limited"


class Overloaded(Retryable):
    code = "overloaded"


class NotReady(Retryable):
    code = "not_ready"


class NotEverywhere(Retryable):
    code = "not_everywhere"


class BrokerUnavailable(Retryable):
    code = "broker_unavailable"


class LanguageUnavailable(Retryable):
    code = "language_unavailable"


class ServiceUnreachable(Retryable):
    code = "service_unreachable"


class NotTheService(ServiceUnreachable):
    code = "not_the_service"


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
    status, code = 410, "blob_missing"


class WrongWeights(OnTheFlyError):
    code = "wrong_weights"


class WrongIdentity(OnTheFlyError):
    code = "wrong_identity"


class CheckpointCorrupt(OnTheFlyError):
    code = "checkpoint_corrupt"


class DiskFull(OnTheFlyError):
    status, code = 507, "disk_full"


class TrainingDiverged(OnTheFlyError):
    code = "training_diverged"


class PeerFailed(OnTheFlyError):
    code = "peer_failed"


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
