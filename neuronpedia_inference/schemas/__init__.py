"""Wire models: what the requests and answers of every route look like. Pydantic only."""
