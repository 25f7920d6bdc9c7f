"""Argument errors: every message names the argument, the value and the likely fix."""

import contextlib
import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any


def one_of(argument: str, value: Any, legal: Iterable[str]) -> str:
    """Returns `value` if it is one of the `legal` names.

    Raises:
        ValueError: With the legal names and the nearest of them.
    """
    names = sorted(legal)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument} must be one of {names}, got {argument}={value!r}.{hint}")


def number(
    argument: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive: bool = False,
) -> float:
    """Returns `value` as a finite float inside [minimum, maximum].

    Args:
        argument: The name to put into the error.
        value: The number to check; text and booleans are refused.
        minimum: The smallest legal value.
        maximum: The largest legal value.
        exclusive: Whether `minimum` itself is illegal.

    Raises:
        ValueError: If `value` is no number, not finite or outside the interval.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        converted, shown = float(value) if is_number else math.nan, repr(value)
    except (OverflowError, ValueError):  # beyond all floats, or of too many digits to show
        converted, shown = math.inf, "a number too large for a float"
    if math.isfinite(converted) and minimum <= converted <= maximum:
        if not exclusive or converted > minimum:
            return converted
    hint = " Remove the quotation marks." if isinstance(value, str) else ""
    low = f"{'>' if exclusive else '>='} {minimum:g}" if minimum > -math.inf else ""
    high = f"<= {maximum:g}" if maximum < math.inf else ""
    interval = " and ".join(part for part in (low, high) if part) or "finite"
    raise ValueError(f"{argument} must be a number {interval}, got {argument}={shown}.{hint}")


def whole_number(argument: str, value: Any, *, minimum: int = 0) -> int:
    """Returns `value` if it is an int of at least `minimum`.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return value
    raise ValueError(f"{argument} must be a whole number >= {minimum}, got {argument}={value!r}.")


class Radius(float):
    """A number that is shown as it was written: "8/255" stays that in tables and file names."""

    written: float | str

    def __str__(self) -> str:
        return str(self.written)

    def __repr__(self) -> str:
        return repr(self.written)


def epsilon(value: Any, argument: str = "epsilon") -> Radius:
    """Perturbation radius in pixel units, from a number or a fraction like "8/255".

    Raises:
        ValueError: If it is neither, or negative.
    """
    if isinstance(value, Radius):
        return value
    written = value
    if isinstance(value, str):
        text, converted = value.replace(" ", ""), math.inf
        with contextlib.suppress(ValueError, ZeroDivisionError, OverflowError):
            # (`Fraction` alone would write the zeros of "1e999999999" out)
            converted = float(Fraction(text)) if "/" in text else float(text)
        if not math.isfinite(converted):
            raise ValueError(
                f"{argument} must be a number or a fraction such as '8/255', "
                f"got {argument}={value!r}."
            )
        value = converted
    radius = Radius(number(argument, value, minimum=0.0))
    radius.written = written
    return radius


def instance(argument: str, value: Any, example: str) -> Any:
    """Returns `value` if it is None or can be called, and is no class.

    Raises:
        ValueError: With an `example` of what it may be.
    """
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    raise ValueError(
        f"{argument} must be None or an instance such as {example}, got {argument}={value!r}."
    )


def sequence(argument: str, value: Any) -> Sequence[Any]:
    """Returns `value` if it is a tuple or list.

    Raises:
        ValueError: If it is not: a single number in parentheses is no tuple.
    """
    if isinstance(value, tuple | list):
        return value
    raise ValueError(f"{argument} must be a tuple such as (0.1,), got {argument}={value!r}.")
