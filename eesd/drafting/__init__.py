"""Who proposes tokens. A drafter continues the last accepted token and shares what it computed with verification."""

from eesd.drafting import assistant, early_exit, exit_head, lookup, medusa, self_sd  # noqa: F401  (registers the drafters)
from eesd.drafting.base import DRAFTERS, Drafter, Prompt, Verified

__all__ = ["DRAFTERS", "Drafter", "Prompt", "Verified"]
