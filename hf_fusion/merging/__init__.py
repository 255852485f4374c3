"""Static merging: a small pure function for each method, and one streaming engine under all of them."""
