"""One route a file: its name is its registration, and `register(app)` what it has."""
