"""Toys, harnesses and command lines that several tests share."""
