"""One side of one row, in a process of its own: `side.py ROW SIDE WORK.json`, told to run by lines on stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from measuring import Work, serve
from rows import ROWS

if __name__ == "__main__":
    row, side, file = sys.argv[1:]
    work = Work(**json.loads(Path(file).read_text()))
    # Memory is measured from the first run on, and growth times several sizes itself.
    serve(ROWS[row].sides[side], work, warm_up=ROWS[row].of in ("seconds", "arithmetic", "bandwidth"))
