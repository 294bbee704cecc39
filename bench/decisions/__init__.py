"""What docs/decisions/0001 and 0002 rest on: each script prints the tables that one of them quotes.

They start servers of their own on loopback, with the settings that PostgreSQL and Kafka ship with, and end within six
minutes. What is compared takes turns (ABBA), so that whatever else the machine does hits all alike.
"""
