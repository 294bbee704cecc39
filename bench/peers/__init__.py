"""Where the relays come from that others have written: nothing of them is kept in this repository."""
