"""DPO4Rec as a distributed Ray system: an LLM taught by the recommender writes what the reranker should know."""

__version__ = "0.1.0"
