"""A program's operations laid out on few block-sized buffers, for a backend that runs one operation at a time.

Every value gets a storage: an array of the state ("p" or a slot), or a scratch register ("r0", "r1", ...; masks of comparisons
"b0", ...). A result takes the place of an operand that dies there, so most slots are computed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from optserve.server.formulas.language import COMPARISONS, Operation, Program


@dataclass(frozen=True)
class Schedule:
    """The steps in order, each (operation's name, destination, operands) in terms of storages; "copy" copies."""

    steps: tuple[tuple[str, str, tuple[str, ...]], ...]
    registers: tuple[str, ...]
    masks: tuple[str, ...]


class _Allocation:
    def __init__(self, program: Program) -> None:
        homes = ("p", *program.slots)
        self.home_of = {result: home for home, result in zip(homes, program.results, strict=True)}
        self.last_use: dict[str, int] = {}
        for position, operation in enumerate(program.operations):
            for operand in operation.operands:
                self.last_use[operand] = position
        for result in program.results:
            self.last_use[result] = len(program.operations)
        self.place = {name: name for name in (*homes, "g", *program.scalars, *program.literals)}
        self.holder: dict[str, str] = {home: home for home in homes}  # storage -> the live value in it
        self.scratch: list[str] = []
        self.masks: list[str] = []

    def _dead(self, storage: str, position: int) -> bool:
        value = self.holder.get(storage)
        return value is None or self.last_use.get(value, -1) < position

    def destination(self, operation: Operation, position: int) -> str:
        """A storage that may be written while the operation's operands are read."""
        pool = self.masks if operation.name in COMPARISONS else self.scratch
        dying = [
            self.place[operand]
            for operand in self._overwritable(operation)
            if self.place[operand] in self.holder and self.last_use[operand] == position
        ]
        home = self.home_of.get(operation.result)
        if operation.name in COMPARISONS:
            candidates = []
        elif home is not None and (home in dying or self._dead(home, position)):
            candidates = [home]
        else:
            candidates = dying
        free = [storage for storage in pool if self._dead(storage, position)]
        for storage in (*candidates, *free):
            return storage
        storage = f"{'b' if operation.name in COMPARISONS else 'r'}{len(pool)}"
        pool.append(storage)
        return storage

    @staticmethod
    def _overwritable(operation: Operation) -> tuple[str, ...]:
        # where() writes its last operand first, then the chosen elements of the second: only the last may be the destination.
        return operation.operands[2:] if operation.name == "where" else operation.operands


def schedule(program: Program) -> Schedule:
    """Lays out the program. The gradient "g" is only read."""
    allocation = _Allocation(program)
    steps: list[tuple[str, str, tuple[str, ...]]] = []
    for position, operation in enumerate(program.operations):
        storage = allocation.destination(operation, position)
        steps.append((operation.name, storage, tuple(allocation.place[operand] for operand in operation.operands)))
        allocation.place[operation.result] = storage
        allocation.holder[storage] = operation.result
    moves = [
        (home, allocation.place[result])
        for home, result in zip(("p", *program.slots), program.results, strict=True)
        if allocation.place[result] != home
    ]
    # All results are saved before any home is written: one home may be what another is to receive.
    saved = [f"r{len(allocation.scratch) + index}" for index in range(len(moves))]
    steps += [("copy", target, (storage,)) for target, (_, storage) in zip(saved, moves, strict=True)]
    steps += [("copy", home, (target,)) for target, (home, _) in zip(saved, moves, strict=True)]
    return Schedule(tuple(steps), (*allocation.scratch, *saved), tuple(allocation.masks))
