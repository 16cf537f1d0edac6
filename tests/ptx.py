"""Reads the PTX of a row kernel for accesses of one address by different threads without a barrier between.

Triton puts barriers where values pass through shared memory; that a kernel reads and writes one row of global memory
is its own affair, and neither the interpreter nor a race checker of shared memory sees it. Accesses are told apart by
what the kernels of `token_logprobs` do:

    body    128 bits at an address of the thread's own: no other thread has these columns
    edges   narrow, at an address that depends on the thread: the few columns are in every warp, one of which stores
    label   narrow, at an address that is the same for all threads, anywhere in the row

Two accesses to a tensor that is read and written, one of them a store, can meet where one is the label's or both are of
the edges. In a kernel that exchanges nothing between threads, what a thread reads too late goes nowhere.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Instruction:
    text: str
    opcode: str
    guard: str | None
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    address: str | None = None  # the register that a load or store goes by
    next: list[int] = field(default_factory=list)  # where it can go on

    @property
    def is_global(self) -> bool:
        return self.opcode.startswith(("ld.global", "st.global"))

    @property
    def is_store(self) -> bool:
        return self.opcode.startswith("st.")

    @property
    def is_barrier(self) -> bool:
        return self.opcode.startswith(("bar.", "barrier."))


_REGISTER = re.compile(r"%[a-z]+\d+\b|%\w+\.[xyz]")


def instructions(ptx: str) -> list[Instruction]:
    """Of the kernel in a PTX file, with what can follow on each."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
    body = body[body.index("\n{") + 2 : body.index("\n}")]
    parsed: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        for statement in re.sub(r"^(\s*\$\w+:)", r"\1;", line).split(";"):
            statement = statement.strip()
            if statement.endswith(":"):
                labels[statement[:-1]] = len(parsed)
            elif statement and not statement.startswith("."):
                parsed.append(_instruction(statement))
    for i, instruction in enumerate(parsed):
        if instruction.opcode.startswith("bra"):
            instruction.next.append(labels[instruction.text.split()[-1]])
        if instruction.opcode != "ret" and not (instruction.opcode.startswith("bra") and instruction.guard is None):
            instruction.next.append(i + 1)
    return parsed


def _instruction(statement: str) -> Instruction:
    guard, rest = re.fullmatch(r"(?:@!?(%p\d+)\s+)?(.*)", statement, re.DOTALL).groups()
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    address = None
    if opcode.startswith(("ld.", "st.")) and (found := re.search(r"\[\s*(%\w+)", operands)):
        address = found[1]
    registers = tuple(_REGISTER.findall(operands))
    if opcode.startswith(("st.", "bra", "bar", "ret")):
        outputs: tuple[str, ...] = ()
    else:
        first = re.match(r"\{[^}]*\}|[^,]*", operands.strip())[0]
        outputs = tuple(_REGISTER.findall(first))
    inputs = registers[len(outputs) :] + (() if guard is None else (guard,))
    return Instruction(statement, opcode, guard, outputs, inputs, address)


@dataclass
class Values:
    """Of every register: whether threads can differ in it, the pointers it comes from, whether it is a constant."""

    differs: dict[str, bool]
    pointers: dict[str, frozenset[str]]
    constant: dict[str, bool]
    exchanged: set[str]  # what came from another lane


def values(parsed: list[Instruction]) -> Values:
    exchanged = {name for each in parsed if each.opcode.startswith("shfl") for name in each.outputs}
    known = Values({}, {}, {}, exchanged)
    for instruction in parsed:
        plain = instruction.opcode.startswith("mov") and not instruction.inputs
        for register in instruction.outputs:
            known.constant[register] = plain and known.constant.get(register, True)
    changed = True
    while changed:
        changed = False
        for instruction in parsed:
            differs, pointers = _of(instruction, known)
            for register in instruction.outputs:
                before = known.differs.get(register, False), known.pointers.get(register, frozenset())
                after = before[0] or differs, before[1] | pointers
                if after != before:
                    known.differs[register], known.pointers[register] = after
                    changed = True
    return known


def _of(instruction: Instruction, known: Values) -> tuple[bool, frozenset[str]]:
    if instruction.opcode in ("ld.param.b64", "ld.param.u64"):
        return False, frozenset(re.findall(r"param_\d+", instruction.text))
    if instruction.opcode.startswith("shfl") or not known.exchanged.isdisjoint(instruction.inputs):
        return False, frozenset()  # a step of a reduction, whose result all threads have
    differs = any(name.startswith(("%tid", "%laneid")) or known.differs.get(name, False) for name in instruction.inputs)
    if instruction.opcode.startswith("ld."):
        return differs, frozenset()
    pointers = (known.pointers.get(name, frozenset()) for name in instruction.inputs)
    return differs, frozenset().union(*pointers)


def races(ptx: str) -> list[str]:
    """What can go wrong, in words; empty where nothing can."""
    parsed = instructions(ptx)
    known = values(parsed)
    found = [
        f"threads can part at `{instruction.text}`, and a barrier is for all"
        for instruction in parsed
        if instruction.opcode.startswith("bra") and instruction.guard and known.differs.get(instruction.guard, False)
    ]
    if not any(instruction.is_barrier for instruction in parsed):
        found = []
    if not any(instruction.opcode.startswith(("shfl", "ld.shared")) for instruction in parsed):
        return found
    both_ways = _pointers(parsed, known, stores=False) & _pointers(parsed, known, stores=True)
    for i, first in enumerate(parsed):
        if first.is_global:
            for second in _without_barrier(parsed, i):
                if _can_meet(first, second, known, both_ways):
                    found.append(f"no barrier between `{first.text}` and `{second.text}`")
    return found


def _without_barrier(parsed: list[Instruction], start: int) -> Iterator[Instruction]:
    """The accesses of global memory that can follow on this one before the next barrier."""
    todo, seen = list(parsed[start].next), set()
    while todo:
        i = todo.pop()
        if i in seen or parsed[i].is_barrier:
            continue
        seen.add(i)
        if parsed[i].is_global:
            yield parsed[i]
        todo += parsed[i].next


def _kind(access: Instruction, known: Values) -> str:
    if ".v4" in access.opcode:
        return "body"
    return "edges" if known.differs.get(access.address, False) else "label"


def _pointers(parsed: list[Instruction], known: Values, *, stores: bool) -> frozenset[str]:
    """What the kernel writes to, or reads."""
    return frozenset().union(*(_reached(each, known) for each in parsed if each.is_global and each.is_store == stores))


def _reached(access: Instruction, known: Values) -> frozenset[str]:
    return known.pointers.get(access.address, frozenset())


def _can_meet(first: Instruction, second: Instruction, known: Values, both_ways: frozenset[str]) -> bool:
    if not (first.is_store or second.is_store):
        return False
    if not _reached(first, known) & _reached(second, known) & both_ways:
        return False
    if all(_stores_constant(access, known) for access in (first, second)):
        return False
    kinds = {_kind(first, known), _kind(second, known)}
    return "label" in kinds or kinds == {"edges"}


def _stores_constant(access: Instruction, known: Values) -> bool:
    stored = [name for name in access.inputs if name not in (access.address, access.guard)]
    return access.is_store and all(known.constant.get(name, False) for name in stored)
