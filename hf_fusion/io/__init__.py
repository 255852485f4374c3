"""Reading and writing with care: whole or not at all, within bounds, and nothing that leads elsewhere."""
