"""Measuring: paired units, restartable row files, baselines and the facts about the machine."""
