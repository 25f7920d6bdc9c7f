import pickle
from fractions import Fraction

import pytest

from tvkeras import checks


@pytest.mark.parametrize(
    ("value", "expected"), [("8/255", 8 / 255), ("0.1", 0.1), (0.5, 0.5), (0, 0.0)]
)
def test_epsilon_accepts_numbers_and_fractions(value, expected):
    assert checks.epsilon(value) == pytest.approx(expected)


@pytest.mark.parametrize("written", ["8/255", "0.10", 0.5])
def test_a_radius_is_shown_as_it_was_written(written):
    radius = pickle.loads(pickle.dumps(checks.epsilon(written)))
    assert checks.epsilon(radius) is radius
    assert (f"{radius}", repr(radius)) == (str(written), repr(written))
    assert radius == float(Fraction(written))


WORDS = ["8/0", "eight", "nan", "inf", "1e400", "-1e999999999", f"{10**400}/3", None, True, [1]]
NUMBERS = [-1, float("nan"), 10**400, -(10**400), 10**5000, Fraction(10**5000, 3)]


@pytest.mark.parametrize("value", [*WORDS, *NUMBERS], ids=lambda value: type(value).__name__)
def test_epsilon_refuses_the_rest_by_name(value):
    with pytest.raises(ValueError, match="tv_weight must be a number"):
        checks.epsilon(value, "tv_weight")


def test_number_in_quotation_marks_gets_a_hint():
    with pytest.raises(ValueError, match="Remove the quotation marks"):
        checks.number("fd_step", "0.1")


@pytest.mark.parametrize("value", [0.0, 1.5, float("inf")])
def test_number_names_the_interval(value):
    with pytest.raises(ValueError, match=r"q must be a number > 0 and <= 1, got q="):
        checks.number("q", value, minimum=0.0, maximum=1.0, exclusive=True)


@pytest.mark.parametrize("value", [0, 1.0, "3", True])
def test_whole_number(value):
    with pytest.raises(ValueError, match="epochs must be a whole number >= 1"):
        checks.whole_number("epochs", value, minimum=1)
