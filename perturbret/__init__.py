"""Reverse perturbation retrieval: rank the genetic perturbations that may have caused a cell's expression."""

__version__ = "0.1.0"
