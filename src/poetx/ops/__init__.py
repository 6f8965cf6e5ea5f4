"""The mathematics: a plain-torch reference, and the operators that training uses."""
