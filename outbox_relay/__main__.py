"""``python -m outbox_relay``."""

from outbox_relay.cli import main

main()
