"""Search over the numbers of a recipe: which of them make the best merge."""
