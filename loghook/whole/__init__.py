"""Influence with whole gradients: factors fitted in passes, and scores made in passes; no row is ever stored."""
