"""Conversations, comparisons and prompts: from the hub, from files, built in.

``loading`` is the way in. ``sources`` finds the files of a source and ``files`` reads one; ``shapes`` is the table of
row shapes, ``rows`` and ``trees`` read rows of each, ``turns`` makes messages of single values; ``order`` says which
row comes when and which are held out.
"""

from tercet.data.loading import Loaded, load_comparisons, load_conversations, load_labelled, load_prompts
from tercet.data.order import hold_out, index_at, order
from tercet.data.shapes import SHAPES
from tercet.data.sources import splits

__all__ = [
    "SHAPES",
    "Loaded",
    "hold_out",
    "index_at",
    "load_comparisons",
    "load_conversations",
    "load_labelled",
    "load_prompts",
    "order",
    "splits",
]
