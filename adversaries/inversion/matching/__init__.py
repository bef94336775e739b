"""Matching of gradients: objectives, regularisers, pixels, problem, descent."""
