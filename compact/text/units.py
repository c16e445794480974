"""Units of measure: which quantity a word measures, so that amounts in two units are told apart."""

from __future__ import annotations

Unit = tuple[str, str]
"""What is measured, and the name of the unit: ("length", "centi-meter")."""

_MEASURES = {
    "time": "second seconds sec secs s|minute minutes min mins|hour hours hr hrs h|day days"
    "|week weeks|fortnight fortnights|month months|year years yr yrs|decade decades"
    "|century centuries",
    "length": "inch inches in|foot feet ft|yard yards yd|mile miles mi",
    "mass": "ounce ounces oz|pound pounds lb lbs|ton tons tonne tonnes|kilo-gram kilo kilos",
    "volume": "cup cups|pint pints pt|quart quarts qt|gallon gallons gal"
    "|tablespoon tablespoons tbsp|teaspoon teaspoons tsp",
    "money": "dollar dollars $|euro euros €|pound-sterling £|cent cents ¢ pence"
    "|penny pennies|nickel nickels|dime dimes",
}
_METRIC = {
    "time": "second seconds s",
    "length": "meter meters metre metres m",
    "mass": "gram grams g",
    "volume": "liter liters litre litres l L",
    "data": "byte bytes B|bit bits",
    "power": "watt watts W",
    "energy": "joule joules J|calorie calories cal",
    "tension": "volt volts V",
}
_PREFIXES = {
    "": "", "nano": "n", "micro": "µ", "milli": "m", "centi": "c", "deci": "d",
    "kilo": "k", "mega": "M", "giga": "G", "tera": "T",
}  # fmt: skip


def _metric() -> dict[str, Unit]:
    """Returns every metric unit with every prefix, in words and in letters."""
    found: dict[str, Unit] = {}
    for dimension, units in _METRIC.items():
        for names in (unit.split() for unit in units.split("|")):
            for prefix, letter in _PREFIXES.items():
                unit = dimension, f"{prefix}-{names[0]}" if prefix else names[0]
                for name in names:
                    short = len(name) == 1
                    if not short or letter or name in "smglL":  # "5 B" may be an option
                        found[(letter if short else prefix) + name] = unit
    return found


_UNITS = {
    name: (dimension, names.split()[0])
    for dimension, units in _MEASURES.items()
    for names in units.split("|")
    for name in names.split()
} | _metric()
_FIRST = {
    _UNITS[name]
    for name in (
        *("year", "week", "day", "hour", "minute", "mile", "yard", "foot", "ton", "pound"),
        *("gallon", "quart", "dollar", "euro", "kilometer", "meter", "kilogram", "liter"),
    )
}
CENT = _UNITS["cent"]


def unit_of(word: str) -> Unit | None:
    """Returns the unit that a word or sign names, None if it names none."""
    return _UNITS.get(word, _UNITS.get(word.lower()))


def takes_a_smaller_one(unit: Unit | None) -> bool:
    """Whether an amount in a smaller unit may follow: "1 hour 15 minutes"."""
    return unit in _FIRST
