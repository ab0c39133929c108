"""The log on disk: format, writer, reader. It knows arrays and names, no model and no hook."""
