"""BibTeX of what a docstring cites, with what it says and nothing else."""

from __future__ import annotations

import re
import unicodedata

_CITED = re.compile(
    r"(?P<authors>[^\W\d_][^\";:]*?), \"(?P<title>[^\"]+)\", (?P<venue>[^;\"]*?\b(?P<year>(?:19|20)\d\d)\b(?!\.\d))"
)
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def bibtex(references: str) -> str:
    """An entry for each work that is cited as ``Authors, "Title", venue year``; "" where there is none.

    Authors are the family names that stand there; "et al." becomes "and others".
    """
    return "\n\n".join(_entry(found) for found in _CITED.finditer(" ".join(references.split())))


def _entry(found: re.Match[str]) -> str:
    authors = found["authors"].rpartition(": ")[2].rpartition(". ")[2].strip()
    others = authors.endswith("et al.")
    names = [one.strip() for one in re.split(r",| and ", authors.removesuffix("et al.")) if one.strip()]
    first = unicodedata.normalize("NFKD", names[0]).encode("ascii", "ignore").decode()
    word = next(iter(re.findall(r"[A-Za-z]{4,}", found["title"])), "")
    year, eprint = found["year"], _ARXIV.search(found["venue"])
    venue = re.sub(rf",? ?\b{year}\b.*", "", found["venue"]).strip(" ,")
    fields = {
        "author": " and ".join([*names, *(["others"] if others else [])]),
        "title": f"{{{found['title']}}}",
    }
    if eprint:
        fields |= {"eprint": eprint[1], "archivePrefix": "arXiv"}
    elif venue:
        fields["howpublished"] = venue
    fields["year"] = year
    key = re.sub(r"[^a-z]", "", first.lower()) + year + word.lower()
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{key},\n{lines}\n}}"
