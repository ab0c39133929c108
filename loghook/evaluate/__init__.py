"""How good scores are, judged by retraining: pure functions on plain arrays that know no log and no model."""
