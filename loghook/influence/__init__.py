"""Scores from a log and a query, with no model: preconditioning, the blocked scan, and the result."""
