"""A trial for those who have no delora: as a model of transformers, or as an adapter of PEFT; and PEFT's read back."""
