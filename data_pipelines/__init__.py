"""Raw layouts to prepared folders (ArrayRecord and an index of lengths). Never imports jax."""
