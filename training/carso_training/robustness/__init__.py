"""Measuring a trained system under attack, and telling people the figures."""
