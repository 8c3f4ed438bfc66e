"""Dataclass + YAML + command line -> one frozen config.

A config is a frozen dataclass; a group of settings is a dataclass inside it, so `sft.learning_rate` names one setting.
Later layers win: defaults, then a preset, then YAML files, then the command line. Nothing is guessed: a name nobody
declared and a value of another type are refused.
"""

from tercet.config.command_line import parse
from tercet.config.layers import differences, from_mapping, load, suggestion, to_mapping, to_yaml

__all__ = ["differences", "from_mapping", "load", "parse", "suggestion", "to_mapping", "to_yaml"]
