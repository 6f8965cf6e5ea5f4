"""Reading a run or a model: load, generate, evaluate, report."""
