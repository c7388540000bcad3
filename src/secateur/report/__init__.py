"""Turning records into words and tables for people; imports without torch."""
