"""Settings that are checked when they are made."""

import dataclasses
import math

from lab.console import UserError


class Settings:
    """Base of a frozen dataclass of settings. What makes no sense is told in one line."""

    def require(self, name: str, sound: bool, right: str) -> None:
        """Raise UserError, which names the value and what would be right, unless it is `sound`."""
        if not sound:
            raise UserError(f"{name}={getattr(self, name)!r} in RUNS, BUDGETS or "
                            f"{type(self).__name__} cannot be trained with; {right}")

    def require_numbers(self) -> None:
        """Of the fields that are numbers, in the type that each has."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if field.type is int:
                self.require(field.name, isinstance(value, int), "use a whole number")
            elif field.type is float:
                self.require(field.name, number, "use a finite number")
