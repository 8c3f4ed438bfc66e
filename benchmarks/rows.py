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
        gradient_step.ROW, gradient_step.SORTED, rl_step.ROW, tournament.ROW, pairs.DPO, pairs.REWARD, sft.ROW,
        decode.ROW, decode.VLLM, sft.ARITHMETIC, memory.ROW, growth.TOKENS, growth.GROUP_SIZE,
    )
}  # fmt: skip
