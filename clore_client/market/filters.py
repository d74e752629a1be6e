"""Check the filters of a search; know the groups of countries and the names of GPUs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, TypedDict

from clore_client.errors import printable
from clore_client.log import logger
from clore_client.models.server import Server, version_parts
from clore_client.validation import (
    check_bool,
    check_callback,
    check_count,
    check_currency,
    check_id,
    check_list,
    check_number,
    check_string,
    check_type,
    short_repr,
)

SORTS = ("price", "price_per_gpu", "reliability", "vram", "download", "rating")
HIGHEST_RATING = 5.0
MAX_CUDA = "a version such as 12.4 or '12.4'"


# The filters of ``rent``; None is no filter. ``help(CloreClient.find_servers)`` has more.
# As a class, its annotations would be compiled, which makes the import slower.
ServerFilters = TypedDict(  # noqa: UP013
    "ServerFilters",
    {
        "gpu_count": int | None,
        "min_gpu_count": int | None,
        "exact_gpu": bool,
        "min_vram_gb": float | None,
        "min_total_vram_gb": float | None,
        "min_ram_gb": float | None,
        "min_cpu_cores": int | None,
        "min_disk_gb": float | None,
        "min_disk_mbps": float | None,
        "min_download_mbps": float | None,
        "min_upload_mbps": float | None,
        "min_cuda": float | str | None,
        "min_pcie_width": int | None,
        "countries": Iterable[str] | None,
        "exclude_countries": Iterable[str] | None,
        "min_rating": float | None,
        "min_ratings": int | None,
        "min_rental_hours": float | None,
        "exclude_servers": Iterable[int | Server] | None,
        "exclude_owners": Iterable[int] | None,
        "max_price_per_gpu_usd": float | None,
        "include_fees": bool,
        "sort": str | Callable[[Server], Any],
        "limit": int | None,
        "where": Callable[[Server], object] | None,
    },
    total=False,
)


class SearchFilters(ServerFilters, total=False):
    """The filters of ``find_servers`` and ``find_cheapest``."""

    currency: str | None


# The filters that compare a property of a server with a minimum.
MINIMUMS = {
    "min_reliability": "reliability",
    "min_ram_gb": "ram_gb",
    "min_cpu_cores": "cpu_cores",
    "min_disk_gb": "disk_gb",
    "min_disk_mbps": "disk_mbps",
    "min_download_mbps": "download_mbps",
    "min_upload_mbps": "upload_mbps",
    "min_pcie_width": "pcie_width",
    "min_rating": "rating",
    "min_ratings": "rating_count",
    "min_rental_hours": "max_rental_hours",
}


def check_filters(
    given: Mapping[str, Any], method: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Check the filters, and return those that are set, in the form that a search uses.

    Parameters:
        given: the filters by name.
        method: the method that got them; an error about an unknown name suggests its parameters.

    Raises:
        TypeError, ValueError: a filter is unknown, has an invalid value, or contradicts another.
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _CHECKS:
            raise TypeError(f"there is no parameter {short_repr(name)}{_suggestion(name, method)}")
        if value is None:
            continue
        checked[name] = _CHECKS[name](name, value)
        if name.startswith("min_") and checked[name] in (0, (0, 0)):
            del checked[name]  # no limit
    exactly, least = checked.get("gpu_count"), checked.get("min_gpu_count")
    if exactly is not None and least is not None and exactly < least:
        raise ValueError(f"gpu_count={exactly} contradicts min_gpu_count={least}: leave one out")
    allowed = checked.get("countries")
    if allowed is not None and not allowed - checked.get("exclude_countries", frozenset()):
        raise ValueError("countries must have a country that exclude_countries does not name")
    return checked


def _suggestion(name: str, method: Callable[..., Any] | None) -> str:
    import difflib  # imported here, because both are slow and rarely needed
    import inspect

    own = {} if method is None else inspect.signature(method).parameters
    names = [known for known in {**own, **_CHECKS} if known != "filters"]
    close = difflib.get_close_matches(name, names, 1)
    # Do not suggest max_price_per_gpu_usd for max_price: it would allow higher prices.
    if name.startswith("max_price") and "gpu" not in name and "max_price_usd" in names:
        close = ["max_price_usd"]
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _cuda(name: str, value: Any) -> tuple[int, int]:
    check_type(name, value, MAX_CUDA, str, int, float)
    version = version_parts(value)
    if version is None:
        raise ValueError(f"{name} must be {MAX_CUDA}, not {short_repr(value)}")
    return version


def _ids(name: str, values: Any) -> frozenset[int]:
    check_list(name, values, "a list of ids")
    return frozenset(
        check_id(f"{name}[{number}]", value.id if isinstance(value, Server) else value)
        for number, value in enumerate(values)
    )


def _sort(name: str, value: Any) -> Any:
    if callable(value):
        return check_callback(name, value)
    if value not in SORTS:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be one of {', '.join(SORTS)} or callable, not {short_repr(value)}")
    return value


# --- countries ---

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
    check_list(name, values, "a list of country codes such as ['DE', 'EU']")
    codes: set[str] = set()
    for number, value in enumerate(values):
        code = " ".join(check_string(f"{name}[{number}]", value).upper().split())
        if code not in COUNTRY_GROUPS and code not in COUNTRY_CODES:
            groups = ", ".join(sorted(COUNTRY_GROUPS))
            raise ValueError(
                f"{name}[{number}] must be a two-letter country code or one of {groups} (in any "
                f"case), not {short_repr(value)}"
            )
        codes |= COUNTRY_GROUPS.get(code, {code})
    return frozenset(codes)


_PRICE_LIMIT = partial(check_number, infinite=True, unit="USD per hour")
_COUNTS = ("min_gpu_count", "min_cpu_cores", "min_pcie_width", "min_ratings")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("gpu_count", "limit"), partial(check_count, minimum=1)),
    **dict.fromkeys(("min_vram_gb", "min_total_vram_gb", *MINIMUMS), check_number),
    **dict.fromkeys(_COUNTS, check_count),
    **dict.fromkeys(("exact_gpu", "include_fees"), check_bool),
    **dict.fromkeys(("countries", "exclude_countries"), check_countries),
    **dict.fromkeys(("exclude_servers", "exclude_owners"), _ids),
    "min_cuda": _cuda,
    "currency": check_currency,
    "min_rating": partial(check_number, maximum=HIGHEST_RATING),
    "min_reliability": partial(check_number, maximum=100.0),
    **dict.fromkeys(("max_price_usd", "max_price_per_gpu_usd"), _PRICE_LIMIT),
    "gpu_type": check_string,
    "sort": _sort,
    "where": check_callback,
}


# --- names of GPUs ---

LONGEST_NAME = 100  # characters that count; the names come from strangers
NAMED_MODELS = 20  # how many models a warning names at most
NEAREST_MODELS = 5  # how many similar models a warning names
SIMILAR = 0.5  # the lowest ``difflib`` ratio of a similar model

# The rules of folding, applied in this order. Compiled on first use, which makes the import faster.
_FOLDING = (
    (r"^\s*[0-9]{1,3}\s*x(?:\s+(?=\S)|(?=[a-z]))", ""),  # a leading count: "2x RTX 4090"
    (r"(nvidia|geforce|tesla)", r" \1 "),
    (r"[^0-9a-z]+", " "),
    (r"\b(rtx|gtx|gts|gt|titan|quadro)(?=[0-9a-z]?[0-9])", r"\1 "),
    (r"(?<=[0-9])(?=(?:sxm|pcie|nvl)[0-9]?)", " "),  # "V100SXM2"
    (r"\b(sxm[0-9]|pcie)(?=[0-9]+gb)", r"\1 "),  # "SXM232GB" is SXM2 with 32 GB
    (r"(?<=[0-9])(?=(?:ti|super|tisuper|laptop)\b)", " "),
    (r"\btisuper\b", "ti super"),
    (r"([0-9]) gb\b", r"\1gb"),
)
# Words that some names have and others do not, for the same model.
_VENDOR_WORDS = frozenset({"nvidia", "geforce", "tesla", "amd", "radeon"})


@lru_cache(maxsize=4096)
def fold_name(name: str) -> str:
    """Return a GPU name in lower case, split into words in one way.

    ``"NVIDIA GeForce RTX4090"`` and ``"2x RTX 4090"`` become ``"rtx 4090"``.
    """
    text = name[:LONGEST_NAME].lower()
    for pattern, replacement in _FOLDING:
        text = re.sub(pattern, replacement, text)
    words = text.split()
    return " ".join([word for word in words if word not in _VENDOR_WORDS] or words)


def matching_names(query: str, names: Collection[str], *, exact: bool = False) -> frozenset[str]:
    """Return the names that a query means, and warn if it is not clear or not found.

    Names that contain the query as whole words win. Without one, a part of a word is enough.

    Parameters:
        query: a GPU name or a part of it, in any spelling.
        names: all names of the listing.
        exact: accept only the same name.
    """
    wanted = fold_name(query)
    if exact:
        same = frozenset(name for name in names if fold_name(name) == wanted)
        return same or _no_match(query, names)
    words = f" {wanted} "
    if wanted and (whole := frozenset(n for n in names if words in f" {fold_name(n)} ")):
        return whole
    plain, joined = query.strip().lower(), wanted.replace(" ", "")
    parts = frozenset(
        name
        for name in names
        if plain in name.lower() or (joined and joined in fold_name(name).replace(" ", ""))
    )
    if not parts:
        return _no_match(query, names)
    models = model_names(Counter(parts))
    more = f" and {len(models) - NAMED_MODELS} more" if len(models) > NAMED_MODELS else ""
    shown = ", ".join(map(_shown, models[:NAMED_MODELS])) + more
    logger.warning("no GPU is named %s as a whole word; it is a part of %s", _shown(query), shown)
    return parts


def _no_match(query: str, names: Collection[str]) -> frozenset[str]:
    nearest = nearest_models(query, names)
    similar = f"; the nearest are {', '.join(map(_shown, nearest))}" if nearest else ""
    logger.warning("no GPU on the market is named %s%s", _shown(query), similar)
    return frozenset()


def nearest_models(query: str, names: Iterable[str]) -> list[str]:
    """Return the models whose names are most similar to a query, the most similar first."""
    import difflib  # imported here, because it is slow and rarely needed

    models = {fold_name(model): model for model in model_names(Counter(names))}
    close = difflib.get_close_matches(fold_name(query), models, NEAREST_MODELS, SIMILAR)
    return [models[folded] for folded in close]


def model_names(counts: Mapping[str, int]) -> list[str]:
    """Return the models among GPU names, each in its most common spelling, sorted.

    Parameters:
        counts: how often each name is listed.
    """
    return sorted(common_spellings(counts).values(), key=str.lower)


def common_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Return the most common spelling of each folded name; of equally common ones the shortest."""
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(fold_name(name), []).append(name)
    return {
        folded: min(same, key=lambda name: (-counts[name], len(name), name))
        for folded, same in spellings.items()
    }


def _shown(name: str) -> str:
    return repr(printable(name, LONGEST_NAME))
