"""The peers (Kronfluence, Bergson, dattri-llm, LogIX) on our tasks; see README.md."""
