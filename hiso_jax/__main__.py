"""``python -m hiso_jax``, the same as ``hiso-jax``."""

from hiso_jax.cli.main import main

if __name__ == "__main__":
    main()
