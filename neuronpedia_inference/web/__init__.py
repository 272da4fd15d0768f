"""The HTTP door: `create_app` makes the application, `serve` runs it on a port."""
