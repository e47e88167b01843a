"""What `make demo` needs and the tricks do not: two text domains found on the machine, and a small tokenizer."""
