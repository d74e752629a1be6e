"""GPU names: the same model in different spellings, whole words, and the nearest names."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clore_client.market.filters import fold_name, matching_names, model_names, nearest_models

NAMES = (
    "RTX 4090", "RTX 4080", "RTX 4070", "RTX 4070 Ti", "RTX 4070 Ti SUPER", "RTX 4070 SUPER",
    "RTX 3060", "GTX 1080", "A10", "A100", "NVIDIA A100SXM480GB", "RTX A6000",
    "Tesla V100SXM232GB", "Tesla T4", "H100",
)  # fmt: skip


@pytest.mark.parametrize(
    ("spellings", "folded"),
    [
        (("RTX 4090", "RTX4090", "rtx 4090", " NVIDIA GeForce RTX 4090 ", "GeForce RTX4090",
          "2x RTX 4090", "10x NVIDIA GeForce RTX 4090", "RTX-4090", "NVIDIAGeForceRTX4090"),
         "rtx 4090"),
        (("Tesla V100SXM232GB", "V100-SXM2-32GB", "Tesla V100 SXM2 32 GB"), "v100 sxm2 32gb"),
        (("NVIDIA A100SXM480GB", "NVIDIA A100-SXM4-80GB"), "a100 sxm4 80gb"),
        (("A100PCIE40GB", "A100 PCIe 40GB"), "a100 pcie 40gb"),
        (("RTX 4070Ti", "rtx4070 ti"), "rtx 4070 ti"),
        (("RTX 4070TiSUPER", "RTX 4070 Ti SUPER"), "rtx 4070 ti super"),
        (("RTXA6000", "NVIDIA RTX A6000"), "rtx a6000"),
        (("Tesla", "tesla"), "tesla"),  # a vendor alone stays
        (("8x", "8 x"), None),
    ],
)  # fmt: skip
def test_spellings_of_one_model(spellings: tuple[str, ...], folded: str | None) -> None:
    for spelling in spellings:
        assert folded is None or fold_name(spelling) == folded


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("RTX4090", {"RTX 4090"}),
        ("NVIDIA GeForce RTX 4090", {"RTX 4090"}),
        ("2x RTX 4090", {"RTX 4090"}),
        ("4090", {"RTX 4090"}),
        ("A10", {"A10"}),
        ("A100", {"A100", "NVIDIA A100SXM480GB"}),
        ("RTX 4070", {"RTX 4070", "RTX 4070 Ti", "RTX 4070 Ti SUPER", "RTX 4070 SUPER"}),
        ("rtx 4070ti", {"RTX 4070 Ti", "RTX 4070 Ti SUPER"}),
        ("V100", {"Tesla V100SXM232GB"}),
        ("NVIDIA Tesla V100", {"Tesla V100SXM232GB"}),
        ("T4", {"Tesla T4"}),
        ("A6000", {"RTX A6000"}),
    ],
)
def test_whole_words_win(query: str, expected: set[str], caplog: pytest.LogCaptureFixture) -> None:
    assert matching_names(query, NAMES) == expected
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("RTX 40", {n for n in NAMES if n.startswith("RTX 40")}),
        ("rtx40", {n for n in NAMES if n.startswith("RTX 40")}),
        ("x 409", {"RTX 4090"}),
        ("tesla", {"Tesla V100SXM232GB", "Tesla T4"}),
        ("NVIDIA", {"NVIDIA A100SXM480GB"}),
    ],
)
def test_a_part_of_a_word_warns_once(
    query: str, expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert matching_names(query, NAMES) == expected
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert query in record.getMessage()
    assert all(name in record.getMessage() for name in expected)


def test_an_exact_name(caplog: pytest.LogCaptureFixture) -> None:
    assert matching_names("NVIDIA RTX4070", NAMES, exact=True) == {"RTX 4070"}
    assert matching_names("RTX 407", NAMES, exact=True) == frozenset()
    assert "the nearest are 'RTX 4070'" in caplog.text


def test_no_such_name_warns_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    assert matching_names("RTX 4900", NAMES) == frozenset()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no GPU on the market is named 'RTX 4900'; the nearest are 'RTX 40" in record.message
    assert nearest_models("RTX 4909", NAMES)[0] == "RTX 4090"
    caplog.clear()
    assert matching_names("zzz", []) == frozenset()
    assert caplog.records[0].getMessage() == "no GPU on the market is named 'zzz'"


def test_models_have_their_most_common_spelling() -> None:
    counts = {"NVIDIA GeForce RTX 4090": 1, "RTX 4090": 5, "RTX4090": 2, "A100": 1}
    assert model_names(counts) == ["A100", "RTX 4090"]


def test_hostile_names_are_escaped_in_warnings(caplog: pytest.LogCaptureFixture) -> None:
    matching_names("9", ["\x1b[31mRTX 4090", "RTX\n3090"])
    assert "\x1b" not in caplog.text
    assert "\\x1b[31mRTX 4090" in caplog.text


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=5))
def test_no_name_raises_and_a_plain_part_is_always_found(query: str, names: list[str]) -> None:
    found = matching_names(query, names)
    assert found <= set(names)
    plain = query.strip().lower()
    if plain and any(plain in name.lower() for name in names):
        assert found  # as the contract says: a substring, in any case
    for name in names:
        assert fold_name(fold_name(name)) == fold_name(fold_name(fold_name(name)))
