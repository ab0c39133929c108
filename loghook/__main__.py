"""``python -m loghook``."""

from loghook.cli import app

app()
