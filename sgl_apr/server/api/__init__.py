"""The HTTP API of the server: OpenAI's routes and our own."""
