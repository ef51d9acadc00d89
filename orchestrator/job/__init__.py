"""Job files: the schema, its sections, reading and explaining them."""
