"""Stored samples, tokenizer, packing and the training stream. numpy and grain only: this room never imports jax."""
