"""Match GPU names that are written in different ways."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from clore_client.errors import printable
from clore_client.log import logger

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


@functools.lru_cache(maxsize=4096)
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
    logger.warning(
        "no GPU is named %s as a whole word; it is a part of %s%s",
        _shown(query),
        ", ".join(map(_shown, models[:NAMED_MODELS])),
        more,
    )
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
