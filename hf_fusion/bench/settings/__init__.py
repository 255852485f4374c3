"""What each kind of suite makes ready for its methods, and the methods themselves."""
