"""UniHetero pretraining in JAX: one causal transformer over text tokens and visual embeddings (arXiv 2512.23512)."""

__version__ = "0.2.0.dev0"
