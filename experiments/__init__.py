"""One file is one question: `get_config(arg)` returns a ConfigDict with every field explicit."""
