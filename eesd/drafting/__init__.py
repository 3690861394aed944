"""Who proposes tokens. A drafter continues the last accepted token and shares what it computed with verification."""

from eesd.drafting.base import DRAFTERS, Drafter, Prompt, Verified
from eesd.registry import import_modules

__all__ = ["DRAFTERS", "Drafter", "Prompt", "Verified"]

import_modules(__name__, __path__)
