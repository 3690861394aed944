"""Self-distillation: heads learnt from what the target itself writes (self-distillation, arXiv 2406.03853)."""
