"""The one exception tree. Third-party errors are mapped to these at the edge, with `from`."""

from __future__ import annotations


class LbctlError(Exception):
    """Root of all that this project raises on purpose. `str()` is one sentence for people."""


class ConfigError(LbctlError):
    """A configuration was refused. `problems` are all that is wrong, in the order of the file."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MessageError(LbctlError):
    """A datagram or a line from another process was not what the protocol says."""


class KubeError(LbctlError):
    """The API server refused or could not be reached."""


class NotFound(KubeError):
    """404."""


class Conflict(KubeError):
    """409: the object exists already, or it changed since it was read."""


class Gone(KubeError):
    """410: the resourceVersion is too old; list again."""


class Unreachable(KubeError):
    """No answer: connection refused, reset, timed out, or 5xx or 429; a retry makes sense."""


class Forbidden(KubeError):
    """401 or 403."""


class NotLeader(KubeError):
    """This replica does not lead (any more), so it must not write."""


class SpeakerError(LbctlError):
    """ExaBGP or its relay did not do what it was told."""


class DataplaneError(LbctlError):
    """The kernel refused a table, a route or a rule."""


class LabError(LbctlError):
    """The lab could not do what was asked; the message has the way out."""


class DrillError(LabError):
    """A drill is not written as it must be, or something in it could not be done."""


class MissingFeature(LabError):
    """This machine lacks something that the lab needs. The message says what, and how to get it."""


class ApiRefusal(LabError):
    """The lab's API server refuses a request. `status` is the Kubernetes Status that it answers."""

    def __init__(self, status: dict[str, object]) -> None:
        super().__init__(str(status.get("message", "")))
        self.status = status
