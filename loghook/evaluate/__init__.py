"""How good scores are: judges and controls on plain arrays, which know no log and no model; a runner that retrains."""
