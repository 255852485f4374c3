"""What the Spaces have in common. Edit it in spaces/_shared, then run `make spaces`: each Space holds what it needs."""
