"""Pure per-sample mathematics and the projections; nothing here knows a module or a hook."""
