"""The vocabulary of a merged model whose inputs have different tokenizers."""
