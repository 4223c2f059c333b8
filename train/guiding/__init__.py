"""Guidance of trained runs: what they have to guide with, the methods, and what is measured."""
