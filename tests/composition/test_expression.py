"""Expressions: what they mean, by independent evaluation; what is wrong, by where."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.composition.expression import parse
from graftwork.errors import BadOption

NAMES = ("a", "b", "toxic", "x.y", "_u1")


@dataclass
class Linear:
    """A weighted sum that Python itself evaluates."""

    terms: list[tuple[float, str]]

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.terms + other.terms)

    def __sub__(self, other: Linear) -> Linear:
        return self + -other

    def __neg__(self) -> Linear:
        return -1.0 * self

    def __pos__(self) -> Linear:
        return self

    def __mul__(self, factor: float) -> Linear:
        return Linear([(factor * weight, name) for weight, name in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Linear:
        return self * (1 / factor)


NUMBERS = st.one_of(
    st.integers(1, 99).map(str),
    st.floats(0.01, 9).map(lambda x: f"{x:.3f}"),
    st.sampled_from(["1e-3", ".5", "2."]),
)


def sums(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    space = st.sampled_from(["", " "])
    return st.one_of(
        st.tuples(inner, space, st.sampled_from("+-"), space, inner).map("".join),
        st.tuples(NUMBERS, space, st.just("*"), inner.map(lambda text: f"({text})")).map("".join),
        st.tuples(inner.map(lambda text: f"({text})"), st.sampled_from("*/"), NUMBERS).map("".join),
        inner.map(lambda text: f"-({text})"),
        inner.map(lambda text: f" ( {text} ) "),
    )


EXPRESSIONS = st.recursive(st.sampled_from(["a", "b", "toxic", "_u1"]), sums, max_leaves=8)


@given(EXPRESSIONS)
def test_an_expression_means_what_python_means_by_it(text: str) -> None:
    wanted = eval(text.strip(), {name: Linear([(1.0, name)]) for name in NAMES})
    found = parse(text)
    assert [name for _, name in found] == [name for _, name in wanted.terms]
    assert [weight for weight, _ in found] == pytest.approx([weight for weight, _ in wanted.terms])


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.sampled_from(NAMES)), min_size=1, max_size=6))
def test_what_is_written_is_read(terms: list[tuple[float, str]]) -> None:
    text = " + ".join(f"({weight!r})*{name}" for weight, name in terms)
    assert parse(text) == terms


@given(st.text(alphabet="ab01.+-*/()' \"e,", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except BadOption:
        return
    assert found


@given(st.text(max_size=12))
def test_any_text_at_all_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadOption):
        parse(text)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a + 0.5*b - toxic", [(1, "a"), (0.5, "b"), (-1, "toxic")]),
        ("0.8*cls + 0.2*(t - s)", [(0.8, "cls"), (0.2, "t"), (-0.2, "s")]),
        ("a + 0.3*(a - t)", [(1, "a"), (0.3, "a"), (-0.3, "t")]),
        ("-'runs/one-two' / 4", [(-0.25, "runs/one-two")]),
        ("(a + b) * (1 - 0.25)", [(0.75, "a"), (0.75, "b")]),
        ("a-b", [(1, "a"), (-1, "b")]),
        ('--a*2 + "b c"', [(2, "a"), (1, "b c")]),
    ],
)
def test_readings(text: str, terms: list[tuple[float, str]]) -> None:
    assert parse(text) == terms


@pytest.mark.parametrize(
    ("text", "word", "position"),
    [
        ("a + ", "found 'the end'", 4),
        ("a b", "unexpected 'b'", 3),
        ("a * b", "two adapters cannot be multiplied", 6),
        ("a + 1", "a number cannot be added", 6),
        ("1 / a", "only a number other than 0 can divide", 6),
        ("a / 0", "only a number other than 0 can divide", 6),
        ("(a + b", "a ')' is missing", 7),
        ("a + $b", "is no number, name or operator", 5),
        ("2a", "is no number, name or operator", 1),
        ("", "found 'the end'", 1),
        ("(" * 60 + "a" + ")" * 60, "more than 50 levels", 51),
        ("1e999*a", "too large", 6),
    ],
)
def test_errors_say_what_and_where(text: str, word: str, position: int) -> None:
    with pytest.raises(BadOption) as found:
        parse(text)
    assert word in str(found.value)
    assert f"position {position} " in str(found.value)


def test_numbers_alone_name_no_adapter() -> None:
    with pytest.raises(BadOption, match="names no adapter"):
        parse("2 * 3")
