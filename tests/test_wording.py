"""What is said of certificates, wherever it is said: the README, /info, the OpenAPI document and the page.

A certificate is easily taken for more than it is. So each of these must say what is proven, and what is not.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUST = {
    "it is the first pass that gives the label": r"first pass",
    "all images within eps have it": r"every image (which differs from the one sent by at most eps|within)",
    "the label may be wrong": r"not (prove|say) that the label is right",
    "the vote is another matter": r"nothing of the vote",
    "so are other and larger changes": r"other changes or of (a larger eps|larger ones)",
}
NEVER = [
    r"guarantee\w*\W+(\w+\W+){0,4}(right|correct|safe|robust)",
    r"(prove|proven|proves|proof|certif\w+)\W+(\w+\W+){0,6}(label|answer|prediction)s?\W+(\w+\W+)?(is|are)\W+(right|correct)",
    r"(provably|certifiably)\W+(right|correct|safe|robust)",
    r"(right|correct)\W+(is|are)\W+(proven|guaranteed|certified)",
    r"(proven|certified|guaranteed)\W+(to\W+be\W+)?(right|correct)\b",
    r"(cannot|can not|can never)\W+be\W+(fooled|attacked|broken)|unbreakable|\bimmune\b",
]
DENIED = r"\b(not|no|nothing|never|neither|nor)\b"  # a sentence that denies it may say it


def plain(text: str) -> str:
    """A text without its markup and line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>|[`*]", " ", text)).split())


def overclaims(text: str) -> list[str]:
    """The sentences that promise what no certificate proves."""
    sentences = re.split(r"(?<=[.:;!?])\s", plain(text))
    return [
        sentence
        for sentence in sentences
        if any(re.search(each, sentence, re.IGNORECASE) for each in NEVER)
        and not re.search(DENIED, sentence, re.IGNORECASE)
    ]


def strings(document: object) -> list[str]:
    """All texts of a JSON document."""
    if isinstance(document, dict):
        return [text for value in document.values() for text in strings(value)]
    if isinstance(document, list):
        return [text for value in document for text in strings(value)]
    return [document] if isinstance(document, str) else []


def test_wherever_certificates_are_told_of_it_says_what_is_proven_and_what_is_not(client):
    page = [client.get("/").text, *(client.get(f"/page/{name}.js").text for name in ("attack", "figures"))]
    said = {
        "README": (ROOT / "README.md").read_text(),
        "/info": client.get("/info").json()["certificate"],
        "OpenAPI": " ".join(strings(client.get("/openapi.json").json())),
        "the page": " ".join(page),
    }
    for where, text in said.items():
        for what, pattern in MUST.items():
            assert re.search(pattern, plain(text)), f"{where} does not say that {what}"
        assert overclaims(text) == [], where


def test_no_document_promises_more():
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").glob("*/MODEL_CARD.md")):
        assert overclaims(path.read_text()) == [], path


@pytest.mark.parametrize(
    "claim",
    [
        "The answer is guaranteed to be correct.",
        "This proves that the label is right.",
        "A certificate means that the prediction is certified correct.",
        "The classifier is provably robust.",
        "With `certify`, the service cannot be fooled.",
        "A proof that all answers are right.",
    ],
)
def test_a_promise_that_no_certificate_keeps_is_found(claim):
    assert overclaims(f"An image is sent. {claim} It gets a label.") == [plain(claim)]


def test_what_is_denied_is_no_promise():
    assert overclaims("It does not prove that the label is right. Nothing guarantees that it is correct.") == []
