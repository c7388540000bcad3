"""All model knowledge, as data: one TOML file per family, and the code that reads them. Imports without torch."""
