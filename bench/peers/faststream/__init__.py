"""faststream-outbox: ``program.py`` is run with an environment of its own."""
