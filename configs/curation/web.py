"""Curation of web pages, code and books in many languages, after section 3.1 of the paper, with every threshold at its default."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "workdir": "runs/curation",
            "input": ("crawl",),
            # Block lists of datatrove; add files of domains: "adult_domains", "high_pii_domains", "unsafe_domains".
            "urls": {"use_datatrove_lists": True},
            "language": {"languages": (), "min_score": 0.5},
            # A line goes when more than 6 of 30M documents hold it.
            "deduplication": {"bands": 14, "rows": 8, "max_line_documents": 6, "line_bucket": 30_000_000},
            # The paper's mix; what a category cannot give within 4 epochs the others give.
            "mix": {"targets": ({"shares": {"general": 0.50, "math_and_reasoning": 0.25, "code": 0.17, "multilingual": 0.08}},), "max_epochs": 4.0},
            "tokenizer": "8192",
            "validation_fraction": 0.01,
        }
    )
