"""`python -m unihetero_jax`: see `cli`."""

import sys

from unihetero_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
