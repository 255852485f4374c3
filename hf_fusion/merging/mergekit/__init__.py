"""mergekit's recipes, read as they are."""
