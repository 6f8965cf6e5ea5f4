"""Other people's training loops: one call each."""
