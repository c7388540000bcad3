"""The nouns that stages hand to each other: frozen records, no behaviour beyond reading and writing themselves."""
