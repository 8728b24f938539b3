"""The OpenAI-compatible server: an engine on a thread of its own (service), and HTTP around it (app, routes)."""
