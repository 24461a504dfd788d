"""Published datasets: addresses, terms, and the checksums that their publishers name; `download.py` downloads them.

Checked against stored copies of the publishers' pages. Where no checksum is given, the publisher names none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RemoteFile:
    """checksum: "md5:..." or "sha256:..."; "" where none is known before the download."""

    name: str
    url: str
    checksum: str = ""


@dataclass(frozen=True)
class PublishedDataset:
    """A published dataset, its terms in brief, and the address of the full terms."""

    files: tuple[RemoteFile, ...]
    terms: str
    link: str


_MOVIELENS = "https://files.grouplens.org/datasets/movielens"
_MOVIELENS_TERMS = (
    "MovieLens, GroupLens Research, University of Minnesota: for research; no commercial use without permission; "
    "acknowledge it in publications; redistribute only as its README allows"
)
# As published in ml-*.zip.md5. ml-latest-small changes from time to time: its companion file is fetched.
_MOVIELENS_MD5 = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m": "ce571fd55effeba0271552578f2648bd",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-latest-small": "",
}

# No checksum is published for the files of 2018, so none can be pinned.
_AMAZON_2018 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_AMAZON_2018_TERMS = (
    "Amazon review data (2018), McAuley Lab, UC San Diego: published for research, without a licence; cite Ni, Li and "
    "McAuley (EMNLP 2019)"
)
_AMAZON_2018_CATEGORIES = """
    AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl
    Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
    Grocery_and_Gourmet_Food Home_and_Kitchen Industrial_and_Scientific Kindle_Store Luxury_Beauty
    Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies
    Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games
"""

# The hub names the sha256 of each file in its answer (X-Linked-Etag); it is compared, not pinned.
_AMAZON_2023 = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"
_AMAZON_2023_TERMS = (
    "Amazon Reviews 2023, McAuley Lab, UC San Diego: made available primarily for research; the lab says that it is "
    "not in a position to assign a licence; cite Hou et al. (arXiv 2403.03952)"
)
_AMAZON_2023_CATEGORIES = """
    All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products Beauty_and_Personal_Care
    Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
    Grocery_and_Gourmet_Food Handmade_Products Health_and_Household Health_and_Personal_Care Home_and_Kitchen
    Industrial_and_Scientific Kindle_Store Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products
    Patio_Lawn_and_Garden Pet_Supplies Software Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement
    Toys_and_Games Video_Games Unknown
"""


def _file(url: str, checksum: str = "") -> RemoteFile:
    return RemoteFile(url.rpartition("/")[2], url, checksum)


def _movielens(name: str, md5: str) -> PublishedDataset:
    readme = f"{name}-README.{'txt' if name in ('ml-100k', 'ml-1m') else 'html'}"
    archive = _file(f"{_MOVIELENS}/{name}.zip", f"md5:{md5}" if md5 else "")
    return PublishedDataset((archive,), _MOVIELENS_TERMS, f"{_MOVIELENS}/{readme}")


def _amazon_2018(category: str) -> PublishedDataset:
    events = _file(f"{_AMAZON_2018}/categoryFilesSmall/{category}_5.json.gz")
    items = _file(f"{_AMAZON_2018}/metaFiles2/meta_{category}.json.gz")
    return PublishedDataset(
        (events, items), _AMAZON_2018_TERMS, "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
    )


def _amazon_2023(category: str) -> PublishedDataset:
    events = _file(f"{_AMAZON_2023}/review_categories/{category}.jsonl")
    items = _file(f"{_AMAZON_2023}/meta_categories/meta_{category}.jsonl")
    return PublishedDataset((events, items), _AMAZON_2023_TERMS, "https://amazon-reviews-2023.github.io/")


# Value of data.dataset -> the terms of its publisher, in brief.
TERMS = {
    "movielens": _MOVIELENS_TERMS,
    "amazon2018": _AMAZON_2018_TERMS,
    "amazon2023": _AMAZON_2023_TERMS,
}


def key_of(name: str) -> str:
    return name.lower().replace("_", "-")


PUBLISHED: dict[str, PublishedDataset] = {
    **{name: _movielens(name, md5) for name, md5 in _MOVIELENS_MD5.items()},
    "amazon2018-beauty": _amazon_2018("All_Beauty"),  # the paper's Amazon-Beauty: 5,269 events
    **{f"amazon2018-{key_of(name)}": _amazon_2018(name) for name in _AMAZON_2018_CATEGORIES.split()},
    **{f"amazon2023-{key_of(name)}": _amazon_2023(name) for name in _AMAZON_2023_CATEGORIES.split()},
}
