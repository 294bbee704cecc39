"""Carries what an application committed to PostgreSQL into Kafka."""

__version__ = "0.1.0"
