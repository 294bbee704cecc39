"""Measurements. Not part of the product, nor of its tests."""
