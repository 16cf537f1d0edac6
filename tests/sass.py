"""Reads the assembly of a kernel, as `nvdisasm -c` prints it, for what its main loop executes.

Counted are the instructions of the shortest way round a loop, so a branch that is seldom taken (the one-pass kernel's
rescaling) does not count, but the test that leads there does. The main loop is the one that takes exponentials.
"""

import re
from dataclasses import dataclass

_LABEL = re.compile(r"\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\S*\s.*`\(\.(L_x_\d+)\)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Loop:
    """One iteration: its instructions, in order."""

    instructions: tuple[str, ...]

    def count(self, opcode: str) -> int:
        """How many begin with this opcode."""
        return sum(re.sub(r"^@!?U?P\w+\s+", "", text).startswith(opcode) for text in self.instructions)

    def bytes_of(self, opcode: str) -> int:
        """Bytes that a thread moves by LDG or STG."""
        widths = (re.search(rf"\b{opcode}\.E\S*", text) for text in self.instructions)
        return sum(_width(found[0]) for found in widths if found)

    def bytes_of_block(self) -> int:
        """Bytes of logits a thread: what is loaded or what is stored, whichever is more."""
        return max(self.bytes_of("LDG"), self.bytes_of("STG"))


def _width(access: str) -> int:
    return next((_WIDTHS[part] for part in access.split(".") if part in _WIDTHS), 4)


def loops(assembly: str) -> list[Loop]:
    """One for each branch backwards that can be reached from its target."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if found := _LABEL.match(line.strip()):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line.strip()):
            code.append(found[1])
    targets = [labels.get(found[1]) if (found := _BRANCH.search(text)) else None for text in code]
    ways = (_shortest_way(code, targets, start, end) for end, start in enumerate(targets) if start is not None)
    return [Loop(way) for way in ways if way]


def _shortest_way(code: list[str], targets: list[int | None], start: int, end: int) -> tuple[str, ...]:
    """The fewest instructions from `start` to `end`, without branches backwards; none where there is no way."""
    if start > end:
        return ()
    before: dict[int, int] = {}  # the one that each is best reached from
    steps = {start: 1}
    for i in range(start, end):
        if i not in steps:
            continue
        conditional = code[i].startswith("@")
        following = [] if (targets[i] is not None or code[i].startswith("EXIT")) and not conditional else [i + 1]
        if targets[i] is not None:
            following.append(targets[i])
        for j in following:
            if i < j <= end and steps[i] + 1 < steps.get(j, len(code) + 1):
                steps[j], before[j] = steps[i] + 1, i
    if end not in steps:
        return ()
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return tuple(code[i] for i in reversed(way))


def main_loop(assembly: str) -> Loop:
    """The longest of the loops that load logits and take exponentials."""
    found = [loop for loop in loops(assembly) if loop.count("MUFU.EX2") and loop.count("LDG")]
    return max(found, key=lambda loop: len(loop.instructions))
