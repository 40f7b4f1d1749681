"""The ground floor of losses, coupling, balancing, merging and models: what they share, a module for each kind."""

from kdflax.numerics import angles, distances, examples, log_probabilities, pooling, products, safe, trees

__all__ = ["angles", "distances", "examples", "log_probabilities", "pooling", "products", "safe", "trees"]
