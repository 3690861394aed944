"""EESD suite: early-exiting speculative decoding, its baselines, and the evidence about them."""

__version__ = "0.1.0"
