"""Every run option, declared once; the command line, TOML files and JSON Schema come from here."""
