"""What can go wrong, as types. Each is also the standard type a caller would expect."""


class ReplanError(Exception):
    """Base of every error that replan raises on purpose; the message names the value, the rule and the fix."""


class PlanError(ReplanError, ValueError):
    """A planner's answer, or a plan file, holds nothing that can be used."""


class ConfigError(ReplanError, ValueError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class ImageError(ReplanError, ValueError):
    """A picture cannot be read or is outside the limits."""


class PlannerError(ReplanError, RuntimeError):
    """The planner itself failed (an outage, a refusal, a missing model); says nothing about the plan."""


class BackboneError(ReplanError, RuntimeError):
    """An editor's weights cannot be loaded or cannot run as asked."""


class JudgeError(ReplanError, RuntimeError):
    """The judge failed; never a score."""


class ServiceError(ReplanError, RuntimeError):
    """A service of ours cannot be reached, stays overloaded, timed out or broke: an outage, never a score."""
