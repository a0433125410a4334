"""What a function holds, read off its bytecode."""

import dis
import functools
import itertools
from types import CodeType
from typing import Any, NamedTuple

import torch

# by opcode, in every Python from 3.10 on
REFUSED = {
    "BEFORE_WITH": "a with block",
    "SETUP_WITH": "a with block",
    "BEFORE_ASYNC_WITH": "a with block",
    "LOAD_SPECIAL": "a with block",  # Python 3.14
    "PUSH_EXC_INFO": "a try block",
    "SETUP_FINALLY": "a try block",
    "STORE_ATTR": "a store to an attribute",
    "DELETE_ATTR": "a deleted attribute",
    "STORE_GLOBAL": "a store to a global",
    "DELETE_GLOBAL": "a deleted global",
    "DELETE_SUBSCR": "a deleted item",
    "IMPORT_NAME": "an import",
    "MATCH_CLASS": "a match of classes",
    "MATCH_MAPPING": "a match of mappings",
    "MATCH_SEQUENCE": "a match of sequences",
    "GET_AWAITABLE": "an await",
}
# attributes of what is no module: a traced value, a list, a dict; and a method of the class above
OF_VALUES = frozenset(
    name for name in (*dir(torch.Tensor), *dir(list), *dir(dict), *dir(str), "forward") if not name.startswith("__")
)


class Code(NamedTuple):
    """What a function holds: why it is refused, and which attributes of ``self`` and globals it reads."""

    refused: tuple[int, str] | None  # the first line that is, and what it holds
    attributes: tuple[tuple[str, ...], ...]
    names: tuple[tuple[str, tuple[str, ...], int], ...]
    of_values: tuple[tuple[str, int], ...]  # attributes of what should be a value of the trace
    none: tuple[tuple[str, int], ...]  # arguments that are held against None, and "" for another local variable


@functools.cache
def read_code(code: CodeType) -> Code:
    """Read what a function's code holds."""
    instructions = list(dis.get_instructions(code))
    refused: list[tuple[int, str]] = []
    attributes: set[tuple[str, ...]] = set()
    names: set[tuple[str, tuple[str, ...], int]] = set()
    of_values: set[tuple[str, int]] = set()
    none: set[tuple[str, int]] = set()
    stored = {name for i in instructions if i.opname.startswith("STORE_FAST") for name in (i.argval, *_pair(i))}
    line = code.co_firstlineno
    first = code.co_varnames[0] if code.co_argcount else None
    if any(i.opname.startswith(("STORE_FAST", "STORE_DEREF")) and first in (i.argval, *_pair(i)) for i in instructions):
        first = None  # it becomes another object
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    own = _of_own(instructions, first).difference(arguments)
    for i, instruction in enumerate(instructions):
        starts = getattr(instruction, "line_number", instruction.starts_line)  # by its name in Python 3.13
        line = line if starts is None else starts
        name = instruction.opname
        if name in REFUSED:
            refused.append((line, REFUSED[name]))
        chain = []
        for following in instructions[i + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(str(following.argval).removesuffix(" + NULL|self"))
        # two loads may be one instruction
        loaded = (instruction.argval, *_pair(instruction))[-1]
        is_self = name.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == first
        if is_self and chain:
            attributes.add(tuple(chain))
        is_global = name in ("LOAD_GLOBAL", "LOAD_NAME")
        if not (is_self or is_global or name in ("LOAD_ATTR", "LOAD_METHOD")):
            if unknown := [name for name in chain if name not in OF_VALUES]:
                refused.append((line, f"a read of .{unknown[0]}, of an object that is not self"))
            reads = itertools.takewhile(lambda following: following.opname == "LOAD_ATTR", instructions[i + 1 :])
            of_values |= {(read.argval, line) for read in reads if "NULL|self" not in read.argrepr}
        if operands := _compared(instructions, i, first):
            left, right = sorted(operands, key=NONE.__eq__)  # None last
            known = left in (OF_SELF, GLOBAL, NONE) and (left, right) != (OF_SELF, OF_SELF)
            if left == "." or (right != NONE and not (known and right in (OF_SELF, GLOBAL))):
                refused.append((line, "a comparison by identity"))
            elif not known and left not in own:
                none.add(("" if left in stored else left, line))
        if is_global:
            names.add((instruction.argval, tuple(chain), line))
    if code.co_flags & 0x20 and not code.co_name.startswith("<"):
        refused.append((code.co_firstlineno, "a yield"))
    return Code(
        refused[0] if refused else None, tuple(sorted(attributes)), tuple(sorted(names)), tuple(of_values), tuple(none)
    )


def _of_own(instructions: list[dis.Instruction], first: str | None) -> set[str]:
    """Return the local variables that are never anything but what is read of self, a global or a constant."""
    assigned: dict[str, set[str]] = {}
    for i, instruction in enumerate(instructions):
        if instruction.opname.startswith("STORE_FAST"):
            plain = instruction.opname == "STORE_FAST" and i > 0
            kind = _expression(instructions, i - 1, first)[1] if plain else ""
            for name in _pair(instruction) or (instruction.argval,):
                assigned.setdefault(name, set()).add(kind)
    return {name for name, kinds in assigned.items() if kinds <= {OF_SELF, GLOBAL, NONE}}


OF_SELF, GLOBAL, NONE = "self.", "global", "None"  # which are no names of variables


def _compared(instructions: list[dis.Instruction], i: int, first: str | None) -> tuple[str, ...]:
    """Return both sides of a comparison by identity, as :func:`_expression` tells them; nothing for any other step."""
    name = instructions[i].opname
    if "_IF_NONE" in name or "_IF_NOT_NONE" in name:
        return _expression(instructions, i - 1, first)[1], NONE
    if name != "IS_OP":
        return ()
    start, right = _expression(instructions, i - 1, first)
    return _expression(instructions, start - 1, first)[1], right


def _expression(instructions: list[dis.Instruction], end: int, first: str | None) -> tuple[int, str]:
    """Return where an expression starts that ends at a step, and what it is.

    A variable's name; "." for an attribute of one; what is read of self; a global or a constant; None; or "" for a call
    and the like.
    """
    i = end
    if instructions[i].opname == "CALL":  # getattr(of, name, default), which no value is asked
        called = [step for step in instructions[max(0, i - 6) : i] if step.opname not in ("PRECALL", "PUSH_NULL")][-4:]
        if called[0].argval == "getattr" and all(step.opname.startswith("LOAD_") for step in called):
            return instructions.index(called[0]), GLOBAL
    while i > 0 and instructions[i].opname == "LOAD_ATTR":
        i -= 1
    name, argument = instructions[i].opname, instructions[i].argval
    if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST"):
        return i, NONE if name == "LOAD_CONST" and argument is None else GLOBAL
    if name.startswith(("LOAD_FAST", "LOAD_DEREF")) and argument == first:
        return i, OF_SELF
    if name.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return i, argument if isinstance(argument, str) and i == end else "."
    return i, "" if i == end else "."


def _pair(instruction: dis.Instruction) -> tuple[Any, ...]:
    """Return the two names of an instruction that is two in one."""
    return instruction.argval if isinstance(instruction.argval, tuple) else ()
