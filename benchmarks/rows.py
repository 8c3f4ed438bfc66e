"""Every row of the table, in the order in which it is printed."""

import decode
import gradient_step
import growth
import memory
import pairs
import rl_step
import sft
import tournament
from measuring import Row

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        gradient_step.ROW, gradient_step.SORTED, gradient_step.MFU, rl_step.ROW, tournament.ROW, pairs.DPO,
        pairs.REWARD, sft.ROW, decode.ROW, decode.BANDWIDTH, decode.VLLM, sft.ARITHMETIC, memory.ROW, memory.LEAST,
        growth.TOKENS, growth.LENGTH, growth.GROUP_SIZE,
    )
}  # fmt: skip
ASKED_FOR = ("mfu", "bandwidth")
"""Rows that are left out on a CPU in float32 unless they are named."""
ANYWHERE = (
    "gradient", "gradient-sorted", "mfu", "rl", "tournament", "dpo", "reward", "sft", "decode", "bandwidth",
)  # fmt: skip
"""Rows that can be measured on another device, in another dtype and with random weights."""
