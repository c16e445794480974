"""Equations and numbers of a step: normal forms, checked arithmetic, what is not mathematics."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from compact.text.equations import equations, list_number, numbers


@pytest.mark.parametrize(
    ("text", "key", "holds"),
    [
        ("3 + 4 = 7", "3+4=7", True),
        ("(3) 5 + 3 = 9", "3+5=9", False),
        ("[2] 4 + 4 = 9", "4+4=9", False),
        ("(3) * 5 = 15", "(3)*5=15", True),
        ("Part 3: 4 + 4 = 8", "4+4=8", True),
        ("3 x .5 = 1.5", "0.5*3=1.5", True),
        ("t = 6 × 10^8 / 3 × 10^8 = 2 seconds", "6*10^8/3*10^8=2", True),
        ("0.71 × 10^3/3 × 10^8 = 2.39 × 10^-6", "0.71*10^3/3*10^8=2.39*10^-6", True),
        ("6 × 10^8 / 3 × 10^8 = 3", "6*10^8/3*10^8=3", False),
        ("600 x 30 = 18\u202f000 watts", "30*600=18000", True),
        ("600 x 30 = 18'000", "30*600=18000", True),
        ("4 + 3 = 7", "3+4=7", True),
        ("3 + 4 = 8", "3+4=8", False),
        ("so 7 - 2 = 5 apples", "7-2=5", True),
        ("2 - 7 = -5", "2-7=-5", True),
        ("290 bananas / 2 groups = 145 bananas per group", "290/2=145", True),
        ("$1,200 + $34.50 = $1,234.50", "1200+34.5=1234.5", True),
        ("6 × 7 = 42", "6*7=42", True),
        ("6 x 7 = 42", "6*7=42", True),
        (r"$6 \times 7 = 42$", "6*7=42", True),
        ("So **3 + 5 = 9**", "3+5=9", False),
        ("- 5 * 4 = 20", "4*5=20", True),
        ("- 3 apples + 4 apples = 7 apples", "3+4=7", True),
        ("-14 + 20 = 6", "-14+20=6", True),
        ("### Step 1: 3 + 4 = 7", "3+4=7", True),
        ("6/24 = 75%", "6/24=75", False),
        ("3 + 2 = 5 (3 red + 2 blue)", "2+3=5", True),
        ("3 + 2 = 6 (3 red + 2 blue)", "2+3=6", False),
        ("50 - 10 = 40 (20% off)", "50-10=40", True),
        ("5 (3 + 2) = 26", "5*(3+2)=26", False),
        ("3 feet * 12 inches = 40 inches", "12*3=40", False),
        ("6/24 = 25%", "6/24=25", True),
        ("8/24 = 33%", "8/24=33", True),
        ("3 + 5 = **8**", "3+5=8", True),
        (r"\$3 + \$5 = \$9", "3+5=9", False),
        (r"5 \text{ apples} + 3 \text{ apples} &= 9", "3+5=9", False),
        (r"\frac{6}{3} = 2", "(6)/(3)=2", True),
        ("6 times 7 = 42", "6*7=42", True),
        ("10 * 1 1/2 = 15 cones", "10*(1+1/2)=15", True),
        ("36 / 9 * 1 1/4 = 5", "36/9*(1+1/4)=5", True),
        ("1/4 of 20 = 5", "1/4*20=5", True),
        ("12 ounces/gallon * 2 = 24", "12*2=24", True),
        ("20% of 50 = 10", "20*50=10", True),
        ("(3 + 4) * 2 = 14", "(3+4)*2=14", True),
        ("3 + 4 * 2 = 11", "3+4*2=11", True),
        ("3 + 4 * 2 = 14", "3+4*2=14", False),
        ("10 / 3 = 3.33", "10/3=3.33", True),
        ("10 / 3 = 3.4", "10/3=3.4", True),  # rounded up
        ("10 / 3 = 3.5", "10/3=3.5", False),
        ("0.1 + 0.2 = 0.4", "0.1+0.2=0.4", False),  # nothing to round
        ("3.50 + 1.25 = 4.76", "1.25+3.5=4.76", False),
        ("2.345 * 2 = 4.7", "2*2.345=4.7", True),
        ("7/8 = 0.89", "7/8=0.89", False),
        ("5 ÷ 0 = 5", None, False),
        ("Step 2. 3 + 4 = 7", "3+4=7", True),
        ("5^2 + 3 = 28", "5^2+3=28", True),
        ("5² + 3 = 27", "5^2+3=27", False),
        ("2**3 * 2 = 16", "2^3*2=16", True),
        ("10^{2} - 1 = 99", "10^(2)-1=99", True),
        ("2^3^0 + 1 = 3", "2^3^0+1=3", True),  # from the right
        ("-5^2 + 30 = 5", "-5^2+30=5", True),
        (r"2 ⋅ 3 + 1 \* 1 = 7", "2*3+1*1=7", True),
        (r"- \(-5 + 121 = 116\)", "-5+121=116", True),
        ("[2 + 3] * 2 = 10", "(2+3)*2=10", True),
        (r"\frac12 + \frac12 = 1", "(1)/(2)+(1)/(2)=1", True),
        ("½ + 1½ = 2", "1/2+(1+1/2)=2", True),
        ("1{,}200 + 3 = 1{,}204", "1200+3=1204", False),
        (r"3 + 2 = \boxed{6}", "2+3=6", False),
        (r"\[ 3 + 2 = 6 \]", "2+3=6", False),
        ("| 5 + 3 = 9 |", "3+5=9", False),
        ("Katie has 9 + 6 = 14 more than half of 3 friends", "6+9=14", False),
        ("Double the price is 2 * 3 = 5", "2*3=5", False),
        ("50 feet/second * 2 = 90", "2*50=90", False),
        ("2 hours * 60 minutes = 100 minutes", "2*60=100", False),
        ("3 km + 2 km = 6 km", "2+3=6", False),
        (r"\$500 + \$700 = \$1,\!200", "500+700=1200", True),
        ("She has 5 apples (3 + 2 = 6)", "2+3=6", False),
        ("120 miles / 2 hours = 50 mph", "120/2=50", False),
        ("$12 + $15 = $28 in total", "12+15=28", False),
        ("He saves $1,000 - $100 = $800 in 12 months", "1000-100=800", False),
        (r"18 \div \frac{2}{3} = 27", "18/((2)/(3))=27", True),
        (r"8 \frac{1}{2} + 1 = 9.5", "(8+1/2)+1=9.5", True),
        ("1/2 + 1/3 = 2/5", "1/2+1/3=2/5", False),  # a fraction is not rounded
        ("10-3=<<10-3=8>>8", "10-3=8", False),
        ("(a) 2 + 2 = 5", "2+2=5", False),
        (r"2 + 2 = 5$, \text{so}", "2+2=5", False),
        ("4500000 - 3 = 4499997", "4500000-3=4499997", True),
        ("4500000 - 3 = 4499999", "4500000-3=4499999", False),  # large, but whole
        ("1,234,567.89 + 0.11 = 1,234,569.00", "0.11+1234567.89=1234569", False),
        ("12345678 * 9 = 111111101", "12345678*9=111111101", False),
        ("2^40 - 1 = 1099511627775", "2^40-1=1099511627775", True),
        ("2^40 - 1 = 1099511627776", "2^40-1=1099511627776", False),
        ("1/3 * 3000000 = 1000000", "1/3*3000000=1000000", True),
        ("3 * 25¢ = 75¢", "25*3=75", True),
        ("3 * 25 ¢ = 80 ¢", "25*3=80", False),
        ("¢25 x 3 = ¢75", "25*3=75", True),
        ("3 × 10^8 / 2 = 1.5 × 10^8", "3*10^8/2=1.5*10^8", True),
        (r"\frac{3 \times 10^8}{7} = 4.29 \times 10^{7}", "(3*10^8)/(7)=4.29*10^(7)", True),
        ("3 × 10^8 / 7 = 4.39 × 10^7", "3*10^8/7=4.39*10^7", False),
        ("2 × 10^-3 / 7 = 2.9 × 10^-4", "2*10^-3/7=2.9*10^-4", True),
        ("2 × 10^-3 / 7 = 2.9 × 10^-3", "2*10^-3/7=2.9*10^-3", False),
        ("1½ - ½ = 1", "(1+1/2)-1/2=1", True),
        ("-½ + 1½ = 2", "-1/2+(1+1/2)=2", False),
        ("60 km/h * 2 = 130 km", "2*60=130", False),
        ("7 + 7 = 15 is what we get", "7+7=15", False),
        ("$2.50 + 75 cents = $3.25", "2.5+75=3.25", True),
        ("$2.50 + 75¢ = $3.25", "2.5+75=3.25", True),
        ("8 * 25 cents = $2", "25*8=2", True),
        ("4 * $0.25 = 100 cents", "0.25*4=100", True),
        ("¢25 x 3 = $0.75", "25*3=0.75", True),
        ("3 * 0.25 = 75 cents", "0.25*3=75", True),
        ("3 * 0.25 = 80 cents", "0.25*3=80", False),
        ("1/4 = 25 cents", "1/4=25", True),
        ("€1 - 20 cents = 80 cents", "1-20=80", True),
        ("£1 - 20 pence = 80 pence", "1-20=80", True),
        ("$500,000 + $500,000 = $1 million", "500000+500000=1000000", True),
        ("$500,000 + $500,000 = $2 million", "500000+500000=2000000", False),
        ("2,500,000 * 2 = 5 million", "2*2500000=5000000", True),
        ("2 million + 3 million = 6 million", "2000000+3000000=6000000", False),
        ("30,000 + 70,000 = 100 thousand", "30000+70000=100000", True),
        ("1,234,567 * 2 = 2.47 million", "1234567*2=2470000", True),  # rounded
        ("1,234,567 * 2 = 2.57 million", "1234567*2=2570000", False),
        ("200 - 10 = 190 million", "200-10=190000000", True),
        ("200 - 10 = 180 million", "200-10=180000000", False),
        ("3 hundred + 5 = 305", "300+5=305", True),
        ("50 * 20 percent = 10", "20*50=10", True),
        ("3/20 = 15 percent", "3/20=15", True),
        ("3/20 = 25 per cent", "3/20=25", False),
        ("1 - 0.2 = 80 percent", "1-0.2=80", True),
        ("2/3 = 66 2/3%", "2/3=(66+2/3)", True),
        ("1/4th of 20 = 5", "1/4*20=5", True),
        ("$2000 / 2/3 = $3000", "2000/2/3=3000", True),
        ("$2000 / 2/3 = $2000", "2000/2/3=2000", False),
        ("2 miles / 1/6 hour = 12", "2/1/6=12", True),
        ("12 / 2 / 3 = 18", "12/2/3=18", False),
        ("6 ÷ ½ = 12", "6/(1/2)=12", True),
        (r"4\frac12 + \frac12 = 5", "(4+1/2)+(1)/(2)=5", True),
        ("20/25 = 8", "20/25=8", False),  # not in lowest terms: a division
        ("24 eggs / 48 boxes = 2", "24/48=2", False),
        ("1/2 + 1/4 = 3/8 = 15 students", "1/2+1/4=3/8", False),
        ("$15 per hour * 3 + $10 tip = $50", "15*3+10=50", False),
        ("5 per day + 6 per day = 12 per day", "5+6=12", False),
        (r"\begin{align*} 7 \times 8 &= 54 \end{align*}", "7*8=54", False),
        ("7 * 8 = 54 (total)", "7*8=54", False),
        ("7 * 8 = 54(in total)", "7*8=54", False),
        ("3 (red ones) + 4 (blue ones) = 7", "3+4=7", True),
        ("Area = 5 × 4 = 21 cm²", "4*5=21", False),
        (r"7 \times 8 = 54 \text{ cm}^2", "7*8=54", False),
        ("3 cm^2 + 1 = 5", "1+3=5", False),
        ("5 square feet + 4 square feet = 8 square feet", "4+5=8", False),
        ("10 / 3 ≈ 4.5", "10/3=4.5", False),
        (r"10 / 3 \approx 3.3", "10/3=3.3", True),
        ("299 * 4 ≈ 1200", "299*4=1200", True),
        ("299 * 4 = 1200", "299*4=1200", False),
    ],
)
def test_equation(text: str, key: str | None, holds: bool) -> None:
    """Units, currency, separators and signs drop out; the arithmetic is checked."""
    found = equations(text)
    assert [e.key for e in found] == ([] if key is None else [key])
    assert all(e.holds is holds for e in found)


def test_chain_has_every_neighbouring_pair() -> None:
    """a = b = c is two equalities when the middle computes nothing but a number."""
    found = equations("48 + 24 = 72 = 8 * 9")
    assert [e.key for e in found][0] == "24+48=72"
    assert all(e.holds for e in found)


def test_running_on_is_read_as_beginning_anew() -> None:
    """Sloppy, but no error; a wrong number in it is one."""
    right, wrong = (
        equations("3 * 12 = 36 months + 6 months = 42"),
        equations("3 * 12 = 35 + 6 = 41"),
    )
    assert [(e.key, e.holds) for e in right] == [("12*3=36", True), ("36+6=42", True)]
    assert [e.holds for e in wrong] == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        "x + 4 = 7",
        "2 * 20 = 5x.",
        "2 * 20 = 5 x. So",
        "600 x 30 = 18 000 watts",
        "17 000/5 = 3 400",
        "1 liter 200 ml - 300 ml = 900 ml",
        "1 kg 50 g - 800 g = 250 g",
        "1 hour 15 minutes - 30 minutes = 45 minutes",
        "(8/3)M + 20 = 1000",
        "5/3 = 25/x",
        "1/3 of the men = 5",
        "25 * 14 = ?",
        f"0 * {'9' * 400} = 0",
        "at 10:30 he left",
        "a 5-year plan",
        "the 3rd of 7",
        "no numbers",
        "x^2 + 3 = 12",
        "f(3) + 2 = 11",
        "sqrt(16) + 2 = 6",
        r"\sqrt{16} + 2 - 1 = 5",
        "log 100 + 1 = 3",
        "half of 10 + 2 = 7",
        "3 more than 5 + 2 = 10",
        "5 squared + 3 - 1 = 27",
        "5 plus 3 - 2 = 6",
        "3 dozen + 2 = 38",
        "5! - 100 = 20",
        "|-5| + 3 - 2 = 6",
        "0b101 + 1 = 6",
        "x1 + 2 + 3 = 9",
        "2a_1 + 1 = 3",
        "24 - 2xy = 36",
        "x = 3 + 1 and y = 5",
        "x = 5/2 or x = -7/2",
        "(2 + 3) 5 + 1 = 26",
        "1 hour + 30 minutes = 90 minutes",
        "10 km + 500 m = 10.5 km",
        "2 dimes + 3 nickels = 35 cents",
        "1/2 hour = 30 minutes",
        "2 × 30 minutes = 1 hour",
        "0^(0-1) + 1 = 1",
        "10^400 + 1 = 1",
        "(4, 3+6) = (4, 9)",
        "500 nm / 2.54 m = 1.97",
        "$50 - 20% = $40",
        r"24 - 8 = 4\sqrt{16}",
        "24 - 8 = 4√16",
        r"-10 + 3 = 7^{\circ}F + 1",
        "45 + 30 = 1 hour 15 minutes",
        "9 AM + 4 = 1 PM",
        "1.5e3 * 2 = 3000",
        "(100-2)...(100-99)(100-101) = 0",
        "$203,75 + $1 = 3",
        "3 groups of 5 - 2 = 13",
        "1/a + 1/b = 1/2 + 1/3",
        "(1/a)^4 = (1/42)^4",
        "8/3 = 24/Y",
        "7 + 7 = 15 is not true",
        "6 * 4 = 2 dozen",
        "2 dozen eggs + 6 eggs = 30 eggs",
        "9 + 7 = 4 squared",
        "2 * 3 = 3 factorial",
        "5 + 3 = 2 cubed",
        "1/2 + 1/4 = 3 quarters",
        "9 + 7 = 18 minus 2",
        "1/2 million * 2 = 1,000,000",
        "3 hours at $15 per hour + $10 tip = $55",
        "5 tickets at $8 each - $10 discount = $30",
        "3 pens for $2 each + $1 = $7",
        "3 boxes with 5 each + 2 = 17",
        "20 per day for 2 days + 10 = 50",
        "$15 an hour + $10 = $55",
        "$15/hour + $10 = $55",
        "1/2 an hour = 30 minutes",
        "1/2 cup = 4 ounces",
        "So 1/4 = 5 cookies",
        r"\frac{1}{4} = 5 cookies",
        "1 metre + 50 centimetres = 150 centimetres",
        "2 kilometres + 300 metres = 2300 metres",
        "2 kilos + 500 grams = 2500 grams",
        "1 GB - 200 MB = 824 MB",
        "1 decade + 5 years = 15 years",
        "2 litres - 50 cl = 150 cl",
        "10 (half price) + 3 = 8",
        "7 * 5 = 40 / 4 (since one of four is hers) = 10",
        "2(x) + 3 = 8",
        "1 (all balls) + 4 (3 balls in one box) + 6 (2 balls) = 11",
        "xy^2 + 3 = 8",
        "3 m^2 - 12 = 0",
        "7+7=15 is wrong",
        "7 + 7 = 15 apples was incorrect",
        "7 + 7 = 15 isn't right",
        f"1 {'9' * 5000}/{'9' * 5000}",
        "5" + " trillion" * 40 + " + 1 = 6",
    ],
)
def test_no_equation(text: str) -> None:
    """What has an unknown, or only looks like mathematics, is not checked."""
    assert equations(text) == ()


def test_an_equation_that_the_text_rejects_is_not_its_own() -> None:
    """What follows is read."""
    assert [e.key for e in equations("7 + 7 = 15 is not true. 7 + 7 = 14.")] == ["7+7=14"]
    assert [e.key for e in equations("2 + 2 = 4 = 5 is wrong and 1 + 1 = 2")] == ["2+2=4", "1+1=2"]


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("1. He has 5", "1. "),
        ("Step 2: 5 + 3", "Step 2: "),
        ("**Step 3:** 5 + 3", "**Step 3:"),
        ("5 + 3 = 8", ""),
        ("5.5 apples", ""),
    ],
)
def test_list_numbers(step: str, number: str) -> None:
    assert list_number(step) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 apples and 4.50 dollars, 3 again", ("3", "4.5")),
        ("1,450 of them", ("1450",)),
        ("1. Take 7", ("7",)),
        ("(3) Take 7", ("7",)),
        ("[3] Take 7", ("7",)),
        ("3.) Take 7", ("7",)),
        ("Clue 3: take 7", ("7",)),
        ("Step 2: take 7", ("7",)),
        ("at 10:30 the 3rd took 20%", ("20",)),
        ("5 million and 2.5 thousand", ("5000000", "2500")),
        ("1/2 million", ("1", "2")),
        ("20 percent of 3 hundred-dollar bills", ("20", "3")),
        ("none", ()),
    ],
)
def test_numbers(text: str, found: tuple[str, ...]) -> None:
    """Distinct, in order, in normal form; times, ordinals and list numbers are not counted."""
    assert numbers(text) == found


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from("+-*/"), st.integers(-3, 3))
def test_arithmetic_is_checked(a: int, b: int, sign: str, error: int) -> None:
    """An equation of whole numbers holds exactly when Python says so (a quotient: to rounding)."""
    exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    said = round(exact) + error
    (found,) = equations(f"{a} {sign} {b} = {said}")
    assert found.operands == (str(a), str(b))
    assert found.result == str(said)
    assert found.holds == (said == exact if float(exact).is_integer() else abs(said - exact) < 1)


def test_a_fraction_in_a_chain_may_be_a_share() -> None:
    """3/4 of 20 students are 15."""
    assert [e.key for e in equations("1/2 + 1/4 = 3/4 = 15 students")] == ["1/2+1/4=3/4"]


@given(st.text(max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    """No input breaks the reader."""
    equations(text)
    numbers(text)
