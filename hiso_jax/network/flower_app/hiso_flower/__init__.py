"""HiSo-JAX as an app of Flower."""
