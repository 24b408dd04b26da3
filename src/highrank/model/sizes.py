"""Fields that the sizes of weights limit: a value that does not fit is refused with the nearest that fit all of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from highrank.base.errors import UserError


def nearest_divisors(wanted: int, *sizes: int, takes: Callable[[int], bool] = lambda divisor: True) -> str:
    """Returns, for a message, the common divisors of `sizes` next to `wanted` below and above it, e.g. "4 or 8".

    `takes` says which are of use; the text is empty if none is.
    """
    common = math.gcd(*sizes)
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    below = next((d for d in reversed(divisors) if d <= wanted and takes(d)), None)
    above = next((d for d in divisors if d >= wanted and takes(d)), None)
    return " or ".join(str(d) for d in dict.fromkeys([below, above]) if d is not None)


class DoesNotFit(UserError):
    """A value of a field that the sizes of a weight rule out; raised by a method's `validate`, for one weight.

    `rule` says what is asked of `field`: that it divides the sizes `divides`, or is at most `most`. The message names values
    that hold for this weight, or for all that are adapted, and that the method takes.
    """

    def __init__(
        self,
        method: Any,
        cfg: Any,
        field: str,
        rule: str,
        shape: tuple[int, int],
        *,
        divides: Sequence[int] = (),
        most: int | None = None,
    ):
        self.method, self.cfg, self.field, self.rule, self.shape = method, cfg, field, rule, shape
        self.divides, self.most, self.blocked = divides, most, ""
        super().__init__(self.rule)

    def __str__(self) -> str:
        return self.among([self.shape])

    def among(self, shapes: Sequence[tuple[int, int]]) -> str:
        """Returns the message, its values for weights of all these shapes (n, k)."""
        value = getattr(self.cfg, self.field)
        start = f"{self.method.name}: {self.field} {self.rule}, got {self.field}={value} for a weight of shape {self.shape}; "
        every = " for every adapted weight" if len(shapes) > 1 else ""
        if self.most is not None:
            most = self._most(shapes)
            return start + (f"at most {self.field}={most}" if most else f"no {self.field} does{every}{self.blocked}")
        near = nearest_divisors(value, *self.divides, takes=lambda divisor: self._takes(divisor, shapes))
        return start + (f"the nearest that do{every}: {near}" if near else f"no {self.field} does{every}{self.blocked}")

    def _takes(self, value: int, shapes: Iterable[tuple[int, int]]) -> bool:
        try:
            cfg = dataclasses.replace(self.cfg, **{self.field: value})
            for n, k in shapes:
                self.method.validate(k, n, cfg)
        except UserError as error:
            self._note(error)
            return False
        return True

    def _most(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Returns the largest value that all shapes take, 0 if there is none."""
        most = self.most or 0
        for n, k in shapes:
            try:
                self.method.validate(k, n, dataclasses.replace(self.cfg, **{self.field: most}))
            except UserError as error:
                self._note(error)
                if not isinstance(error, DoesNotFit) or error.field != self.field:
                    return 0
                most = error.most or 0
        return most

    def _note(self, error: UserError) -> None:
        """Keeps what another field than this one has against a value, so that it is not looked for in this one."""
        if isinstance(error, DoesNotFit) and error.field != self.field:
            self.blocked = f" with {error.field}={getattr(error.cfg, error.field)}, which {error.rule}"


def check_shapes(method: Any, shapes: Iterable[tuple[int, int]], cfg: Any) -> None:
    """Asks a method whether `cfg` fits weights of all these shapes (n, k).

    Raises:
        UserError: for the least weight that it does not fit; what it names instead fits all.
    """
    distinct = sorted(set(shapes), key=min)
    for n, k in distinct:
        try:
            method.validate(k, n, cfg)
        except DoesNotFit as error:
            raise UserError(error.among(distinct)) from None
