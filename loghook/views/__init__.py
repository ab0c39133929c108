"""Views: what a person looks at. They take plain data and know no model and no log."""
