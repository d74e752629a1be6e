"""Country codes, and the groups of countries that a search can name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clore_client.validation import short_repr

_EU = "AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE"
# ISO 3166-1 codes by continent, and XK, which is in use for Kosovo.
_CONTINENTS = {
    "AFRICA": "AO BF BI BJ BW CD CF CG CI CM CV DJ DZ EG EH ER ET GA GH GM GN GQ GW IO KE KM LR LS "
    "LY MA MG ML MR MU MW MZ NA NE NG RE RW SC SD SH SL SN SO SS ST SZ TD TG TN TZ UG YT ZA ZM ZW",
    "ANTARCTICA": "AQ BV GS HM TF",
    "ASIA": "AE AF AM AZ BD BH BN BT CC CN CX GE HK ID IL IN IQ IR JO JP KG KH KP KR KW KZ LA LB "
    "LK MM MN MO MV MY NP OM PH PK PS QA SA SG SY TH TJ TL TM TR TW UZ VN YE",
    "EUROPE": f"{_EU} AD AL AX BA BY CH FO GB GG GI IM IS JE LI MC MD ME MK NO RS RU SJ SM UA VA "
    "XK",
    "NORTH AMERICA": "AG AI AW BB BL BM BQ BS BZ CA CR CU CW DM DO GD GL GP GT HN HT JM KN KY LC "
    "MF MQ MS MX NI PA PM PR SV SX TC TT US VC VG VI",
    "OCEANIA": "AS AU CK FJ FM GU KI MH MP NC NF NR NU NZ PF PG PN PW SB TK TO TV UM VU WF WS",
    "SOUTH AMERICA": "AR BO BR CL CO EC FK GF GY PE PY SR UY VE",
}
COUNTRY_GROUPS = {
    **{name: frozenset(codes.split()) for name, codes in _CONTINENTS.items()},
    "EU": frozenset(_EU.split()),
    "EEA": frozenset(_EU.split()) | {"IS", "LI", "NO"},
    "UK": frozenset({"GB"}),
}
COUNTRY_CODES = frozenset().union(*COUNTRY_GROUPS.values())


def check_countries(name: str, values: Any) -> frozenset[str]:
    """Return the two-letter codes in a list of codes and groups such as ``"EU"`` or ``"Asia"``."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be a list of country codes such as ['DE', 'EU'], not {short_repr(values)}"
        )
    codes: set[str] = set()
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{number}] must be a string, not {short_repr(value)}")
        code = " ".join(value.upper().split())
        if code not in COUNTRY_GROUPS and code not in COUNTRY_CODES:
            groups = ", ".join(sorted(COUNTRY_GROUPS))
            raise ValueError(
                f"{name}[{number}] must be a two-letter country code or one of {groups} (in any "
                f"case), not {short_repr(value)}"
            )
        codes |= COUNTRY_GROUPS.get(code, {code})
    return frozenset(codes)
