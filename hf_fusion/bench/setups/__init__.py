"""Task setups: the loaded experts and rows that the methods for one kind of suite share."""
