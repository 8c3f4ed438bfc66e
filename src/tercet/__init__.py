"""tercet trains language models from human preferences, on the machine you have."""

__version__ = "0.1.0"
