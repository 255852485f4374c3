"""The streaming engine under all merging methods: tensors in chunks, read and written file by file."""
