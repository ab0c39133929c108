"""Hooks: from a user's model and loop to rows. Nothing right of the log imports this package."""
